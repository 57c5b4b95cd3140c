"""Messages as chat data sets write them: what each form is read as, what of it is a target, and what is noted."""

import json

import pytest
from letters import Letters

from jaxchat.data.conversations import COLUMNS, LAYOUTS, read
from jaxchat.data.formats import FORMATS
from jaxchat.tokenizer.chat import Malformed, render

NAMES = ("user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end")
LETTERS = Letters(**{name: 80 + i for i, name in enumerate((*NAMES, "output_start", "output_end"))})
CALL = '{"name": "f", "arguments": "{}"}'
FUNCTION = json.loads(CALL)


def say(role, content=None, **keys):
    return {"role": role, "content": content, **keys}


def text(words, **keys):
    return {"type": "text", "text": words, **keys}


def shown(messages):
    """Messages on one line: [system|user|assistant] words, calls as (call=result), what is not a target in {}."""
    lines = []
    for message in messages:
        parts = message["content"]
        parts = [text(parts)] if isinstance(parts, str) else parts
        marks = {"text": "{}", "python": "({}", "python_output": "={})"}
        words = ""
        for part in parts:
            shown_part = marks[part["type"]].format(part["text"])
            words += shown_part if part.get("in_loss", message.get("in_loss", True)) else "{" + shown_part + "}"
        lines.append(f"[{message['role'][0]}]{words}")
    return " ".join(lines)


U, A = say("user", "u"), say("assistant", "a")
TOOL = "You can call these tools:\n"
CALLED = say("assistant", tool_calls=[{"id": "1", "function": FUNCTION}])
TWO = say("assistant", tool_calls=[{"id": "1", "function": "f"}, {"id": "2", "function": "g"}])
LEFT = "whose messages after the last answer are left out"
GREETED = "whose greeting before the first user message is left out"
WEIGHED = "with messages of weight 0, which are not trained on"
F = f"({CALL}"
FORMS = {
    # null is nothing
    "a part of null": ([say("user", [text(None), text("u")]), A], "[u]u [a]a"),
    "null among parts": ([say("user", [None, text("u")]), say("assistant", [text(None), text("a")])], "[u]u [a]a"),
    "null among messages": ([None, U, A, None], "[u]u [a]a"),
    "content null, value given": ([say("user", None, value="u"), A | {"value": None}], "[u]u [a]a"),
    "role null, from given": ([{"role": None, "from": "human", "value": "u"}, A], "[u]u [a]a"),
    "calls of null": ([U, A | {"tool_calls": None, "function_call": None}], "[u]u [a]a"),
    "a call of null": ([U, A | {"tool_calls": [None]}], "[u]u [a]a"),
    "a result of null": ([U, CALLED, say("tool"), A], f"[u]u [a]{F}=)a"),
    # weights
    "weight 0": ([U, A | {"weight": 0}, U, A | {"weight": 1}], "[u]u [a]{a} [u]u [a]a", WEIGHED),
    "train false": ([U, A | {"train": False}, U, A | {"train": True}], "[u]u [a]{a} [u]u [a]a", WEIGHED),
    "training false": ([U, A | {"training": False}, U, A], "[u]u [a]{a} [u]u [a]a", WEIGHED),
    "loss false": ([U, A | {"loss": False}, U, A], "[u]u [a]{a} [u]u [a]a", WEIGHED),
    "weight null": ([U, A | {"weight": None, "train": 1.0}], "[u]u [a]a"),
    "a call of weight 0": ([U, CALLED | {"weight": 0}, say("tool", "1"), A], f"[u]u [a]{{{F}}}=1)a", WEIGHED),
    "a part of a result of weight 0": ([U, CALLED, say("tool", [text("1", weight=0), text("2")]), A],
                                       f"[u]u [a]{F}{{=12)}}a", WEIGHED),
    "a part of weight 0": ([U, say("assistant", [text("w", weight=0), text("a")])], "[u]u [a]{w}a", WEIGHED),
    "a user of weight 0": ([U | {"weight": 0}, A], "[u]{u} [a]a", WEIGHED),
    # systems
    "two systems": ([say("system", "s"), say("system", "t"), U, A], "[s]s\n\nt [u]u [a]a"),
    "developer": ([say("developer", "s"), U, A], "[s]s [u]u [a]a"),
    "an empty system": ([say("system", None), U, A], "[u]u [a]a"),
    # calls
    "function_call": ([U, say("assistant", function_call=FUNCTION), say("function", "1"), A], f"[u]u [a]{F}=1)a"),
    "function_call as JSON": ([U, say("assistant", function_call=CALL), say("function", "1"), A], f"[u]u [a]{F}=1)a"),
    "one call, no list": ([U, say("assistant", tool_calls={"function": FUNCTION}), say("tool", "1"), A],
                          f"[u]u [a]{F}=1)a"),
    "calls as JSON": ([U, say("assistant", tool_calls=json.dumps([{"function": FUNCTION}])), say("tool", "1"), A],
                      f"[u]u [a]{F}=1)a"),
    "a call as JSON": ([U, say("assistant", tool_calls=CALL), say("tool", "1"), A], f"[u]u [a]{F}=1)a"),
    "a call in words": ([U, say("assistant", tool_calls="f()"), say("tool", "1"), A], "[u]u [a](f()=1)a"),
    "a call as an object": ([U, say("function_call", FUNCTION | {"arguments": {}}), say("observation", {"x": 1}), A],
                            '[u]u [a]({"name": "f", "arguments": {}}={"x": 1})a'),
    "a result in parts": ([U, CALLED, say("tool", [text("1"), None, text("2")]), A], f"[u]u [a]{F}=12)a"),
    "a result of a list": ([U, CALLED, say("tool", ["1", 2]), A], f'[u]u [a]{F}=["1", 2])a'),
    "two calls": ([U, TWO, say("tool", "1"), say("tool", "2"), A], "[u]u [a](f=1)(g=2)a"),
    "two calls by name": ([U, TWO, say("tool", "2", tool_call_id="2"), say("tool", "1", tool_call_id="1"), A],
                          "[u]u [a](f=1)(g=2)a"),
    "two calls in turn": ([U, say("call", "f"), say("call", "g"), say("tool", "1"), say("tool", "2"), A],
                          "[u]u [a](f=1)(g=2)a"),
    "a result at the end": ([U, CALLED, say("tool", "1")], f"[u]u [a]{F}=1)"),
    "a result before the next user": ([U, CALLED, say("tool", "1"), U, A], f"[u]u [a]{F}=1) [u]u [a]a"),
    # beginnings and ends
    "a greeting": ([say("assistant", "Hi"), U, A], "[u]u [a]a", GREETED),
    "a greeting after the system": ([say("system", "s"), say("gpt", "Hi"), U, A], "[s]s [u]u [a]a", GREETED),
    "an empty last turn": ([U, A, U, say("assistant", "")], "[u]u [a]a", LEFT),
    "a null last turn": ([U, A, U, say("assistant")], "[u]u [a]a", LEFT),
    "no answer": ([U, A, U], "[u]u [a]a", LEFT),
    # other contents
    "numbers": ([say("user", 5), say("assistant", [text(6)])], "[u]5 [a]6"),
    "zero and false": ([say("user", 0), say("assistant", False)], "[u]0 [a]false"),
    "blank parts": ([U, A, say("user", [text(" "), text("\n")]), say("assistant", " ")], "[u]u [a]a", LEFT),
    "words in a list": ([say("user", ["u", "v"]), A], "[u]uv [a]a"),
    "parts of the other interface": ([say("user", [{"type": "input_text", "text": "u"}]),
                                      say("assistant", [{"type": "output_text", "text": "a"}])], "[u]u [a]a"),
    "parts by place": ([U, A | {"train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]}], "[u]u [a]a",
                       "with train_detail, which is not read"),
    "blank calls": ([U, A | {"tool_calls": " "}], "[u]u [a]a"),
    "reasoning": ([U, A | {"reasoning_content": "r"}], "[u]u [a]a", "with reasoning_content, which is not read"),
}  # fmt: skip
SYSTEM, TWO_TOOLS = say("system", "s"), [{"name": "f"}, "g"]
ROWS = {
    "tools beside a system": ({"messages": [SYSTEM, U, A], "tools": [{"name": "f"}]}, f'[s]s\n\n{TOOL}{{"name": "f"}}'),
    "a system beside a system": ({"messages": [SYSTEM, U, A], "system": "r"}, "[s]r\n\ns"),
    "system_prompt": ({"prompt": "u", "response": "a", "system_prompt": "s", "system": None}, "[s]s"),
    "two tools": ({"messages": [U, A], "tools": TWO_TOOLS}, f'[s]{TOOL}{{"name": "f"}}\ng'),
    "one tool": ({"messages": [U, A], "tools": None, "functions": {"name": "f"}}, f'[s]{TOOL}{{"name": "f"}}'),
    "tools as JSON": ({"messages": [U, A], "tools": json.dumps([{"name": "f"}, None])}, f'[s]{TOOL}{{"name": "f"}}'),
    "no tools as JSON": ({"messages": [U, A], "tools": "[]"}, ""),
    "a null as JSON": ({"messages": [U, A], "tools": "null"}, ""),
    "a null tool": ({"messages": [U, A], "tools": [None, ""]}, ""),
    "blank tools": ({"messages": [U, A], "tools": " "}, ""),
    "messages as JSON": ({"messages": json.dumps([U, None, A]), "conversations": None}, ""),
    "no history as JSON": ({"instruction": "u", "output": "a", "history": "[]"}, ""),
    "a null history": ({"instruction": "u", "output": "a", "history": [None]}, ""),
    "single messages": ({"prompt": U, "completion": {"from": "gpt", "value": "a"}}, ""),
    "tools of a question": ({"question": "u", "answer": "a", "tools": "f"}, f"[s]{TOOL}f"),
    "messages null": ({"messages": None, "instruction": "u", "output": "a"}, ""),
    "completion null": ({"prompt": "u", "completion": None, "response": "a"}, ""),
    "choices null": ({"question": "u", "choices": None, "answer": "a"}, ""),
}
FIELDS = {
    "an input of a list": ({"instruction": "u", "input": [0, 1], "output": "a"}, "[u]u\n\n[0, 1] [a]a"),
    "an input of an object": ({"instruction": "u", "input": {"x": None}, "output": "a"}, '[u]u\n\n{"x": null} [a]a'),
    "an input of zero": ({"instruction": "u", "input": 0, "output": "a"}, "[u]u\n\n0 [a]a"),
    "a null input": ({"instruction": "u", "input": None, "context": "c", "output": "a"}, "[u]u\n\nc [a]a"),
    "an empty input": ({"instruction": "u", "input": [], "output": "a"}, "[u]u [a]a"),
    "an output of a number": ({"instruction": "u", "output": 7}, "[u]u [a]7"),
    "an answer of a number": ({"question": "u", "answer": 1}, "[u]u [a]1"),
    "a completion of a number": ({"prompt": "u", "completion": 2.5}, "[u]u [a]2.5"),
    "numbers to choose from": ({"question": "u", "choices": [1, 2], "answer": 0}, None),
    "history": ({"instruction": "u", "output": "a", "history": [["q", "r"], ["s", "t"]]},
                "[u]q [a]r [u]s [a]t [u]u [a]a"),
    "history of another layout": ({"prompt": "u", "response": "a", "history": [["q", "r"]]}, "[u]q [a]r [u]u [a]a"),
    "history of messages": ({"question": "u", "answer": "a", "history": [U, A]}, "[u]u [a]a [u]u [a]a"),
    "no history": ({"instruction": "u", "output": "a", "history": None}, "[u]u [a]a"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_messages_of_every_form_are_read(name):
    given, expected, *notes = FORMS[name]
    for key in ("messages", "conversations"):
        said: list[str] = []
        assert shown(read({key: json.loads(json.dumps(given))}, said.append)) == expected
        assert sorted(set(said)) == notes


@pytest.mark.parametrize("name", ROWS)
def test_keys_beside_the_messages_open_the_conversation(name):
    row, opening = ROWS[name]
    assert shown(read(row)) == f"{opening} [u]u [a]a".strip()
    assert set(row) <= set(COLUMNS)


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_are_no_text_are_written_as_json(name):
    row, expected = FIELDS[name]
    assert shown(read(row)) == (expected or "[u]Multiple Choice question: u\n- 1=A\n- 2=B\n\n"
                                "Respond only with the letter of the correct answer. [a]A")  # fmt: skip
    assert set(row) <= set(COLUMNS)


def test_the_alpaca_template_has_the_input_and_counts_histories():
    (prompt, _), row = FORMATS["alpaca"].read(FIELDS["an input of a list"][0]), FIELDS["history"][0]
    assert "### Input:\n[0, 1]\n" in prompt["content"]
    with pytest.raises(Malformed, match="6 messages, but the Alpaca template has one question and answer"):
        FORMATS["alpaca"].read(row)


def test_every_layout_is_read_from_parquet():
    assert {key for keys, _ in LAYOUTS for key in keys} <= set(COLUMNS)


def targets(messages, **options):
    ids, in_loss = render(messages, LETTERS, **options)
    names = {number: name for name, number in LETTERS.specials.items()}
    spelled = [names.get(number, chr(ord("0") + number)) for number in ids]
    return "".join(word for word, learn in zip(spelled, in_loss, strict=True) if learn)


def test_what_has_weight_0_is_never_a_target():
    end = "<|assistant_end|>"
    for name in ("weight 0", "train false", "a call of weight 0", "a user of weight 0"):
        messages = read({"messages": FORMS[name][0]})
        assert targets(messages) == f"a{end}"
    messages = read({"messages": FORMS["weight 0"][0]})
    user = f"<|user_start|>{chr(ord('u') - 60)}<|user_end|>"  # an id of the letter u
    assert targets(messages, everything=True) == f"{user}{user}<|assistant_start|>a{end}"
    messages = read({"messages": FORMS["a user of weight 0"][0]})
    assert targets(messages, everything=True) == f"<|assistant_start|>a{end}"
    messages = read({"messages": [say("system", "s", weight=0), U, A]})
    assert targets(messages, everything=True) == f"<|assistant_start|>a{end}"
    alpaca = FORMATS["alpaca"]
    _, in_loss = alpaca.encode(alpaca.read({"messages": [say("system", "s", weight=0), U, A]}), LETTERS, True)
    assert sum(in_loss) == 2


def test_a_model_does_not_learn_to_stop_after_a_result():
    end, call = "<|assistant_end|>", "<|python_start|>{}<|python_end|>"
    given = [U, say("call", "f"), say("tool", "1")]
    assert targets(read({"messages": given})) == call.format("f")
    assert targets(read({"messages": [*given, U, A]})) == f"{call.format('f')}a{end}"
    assert targets(read({"messages": [*given, A]})) == f"{call.format('f')}a{end}"
