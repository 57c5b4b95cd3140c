"""Conversations: every format read as expected, and what is none skipped with its reason and place."""

import json
from functools import partial

import pytest
from letters import Letters

from jaxchat.data import conversations, tinyworld
from jaxchat.data.conversations import alpaca_prompt, opening, read, words
from jaxchat.data.formats import FORMATS
from jaxchat.data.source import Reading, Source
from jaxchat.data.sources import KINDS, find
from jaxchat.errors import UserError
from jaxchat.tokenizer.chat import Malformed


def said(*messages):
    return [{"role": role, "content": content} for role, content in messages]


def part(kind, text):
    return {"type": kind, "text": text}


HELLO = said(("user", "Hello"), ("assistant", "Hi"))
CALL = '{"name": "roll", "arguments": {"sides": 6}}'
ROWS = {
    "messages": ({"messages": HELLO, "id": 7}, HELLO),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}, HELLO),
    "capital roles": ({"messages": said(("User", "Hello"), ("Assistant", "Hi"))}, HELLO),
    "system message": (
        {"conversations": [{"from": "system", "value": "Be kind."}, *HELLO]},
        said(("system", "Be kind.")) + HELLO,
    ),
    "system beside": ({"system": "Be kind.", "messages": HELLO}, said(("system", "Be kind.")) + HELLO),
    "empty system": ({"messages": said(("system", " ")) + HELLO}, HELLO),
    "several turns": ({"messages": HELLO + HELLO}, HELLO + HELLO),
    "unanswered": ({"messages": [*HELLO, *said(("user", "Are you there?"))]}, HELLO),
    "prompt and completion": ({"prompt": "Hello", "completion": "Hi"}, HELLO),
    "prompt and response": ({"prompt": "Hello", "response": "Hi"}, HELLO),
    "prompt of messages": ({"prompt": HELLO + HELLO[:1], "completion": HELLO[1:]}, HELLO + HELLO),
    "texts in parts": (
        {"messages": said(("user", [part("text", "Hel"), part("text", "lo")]), ("assistant", [part("text", "Hi")]))},
        HELLO,
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        said(("user", "Add.\n\n2 and 3"), ("assistant", "5")),
    ),
    "alpaca without input": ({"instruction": "Hello", "input": "", "output": "Hi"}, HELLO),
    "dolly": (
        {"instruction": "Who?", "context": "Ann ran.", "response": "Ann", "category": "qa"},
        said(("user", "Who?\n\nAnn ran."), ("assistant", "Ann")),
    ),
    "question and answer": ({"question": "Hello", "answer": "Hi"}, HELLO),
    "gsm8k": (
        {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 in May.\n2<<1+1>>\n#### 24"},
        said(
            ("user", "How many?"),
            (
                "assistant",
                [
                    part("text", "48/2 = "),
                    part("python", "48/2"),
                    part("python_output", "24"),
                    part("text", "24 in May.\n2"),
                    part("python", "1+1"),
                    part("python_output", ""),
                    part("text", "\n#### 24"),
                ],
            ),
        ),
    ),
    "mmlu": (
        {"question": "Which is a bird?", "choices": ["fox", "owl"], "answer": 1, "subject": "biology"},
        said(
            (
                "user",
                "Multiple Choice question: Which is a bird?\n- fox=A\n- owl=B\n\n"
                "Respond only with the letter of the correct answer.",
            ),
            ("assistant", "B"),
        ),
    ),
    "mmlu by letter": (
        {"question": "Which?", "choices": ["fox", "owl", "cat"], "answer": "C"},
        said(("user", conversations.choice_prompt("Which?", ["fox", "owl", "cat"])), ("assistant", "C")),
    ),
    "tools": (
        {
            "tools": [{"name": "roll"}],
            "messages": said(
                ("user", "Roll"), ("function_call", CALL), ("observation", '{"rolled": 4}'), ("assistant", "A 4.")
            ),
        },
        said(
            ("system", 'You can call these tools:\n{"name": "roll"}'),
            ("user", "Roll"),
            ("assistant", [part("python", CALL), part("python_output", '{"rolled": 4}'), part("text", "A 4.")]),
        ),
    ),
    "tool_calls": (
        {
            "messages": [
                *said(("user", "Roll")),
                {
                    "role": "assistant",
                    "content": "Wait.",
                    "tool_calls": [{"type": "function", "function": json.loads(CALL)}],
                },
                *said(("tool", "4"), ("assistant", "A 4.")),
            ]
        },
        said(
            ("user", "Roll"),
            (
                "assistant",
                [part("text", "Wait."), part("python", CALL), part("python_output", "4"), part("text", "A 4.")],
            ),
        ),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_every_format_is_read(name):
    row, expected = ROWS[name]
    assert read(json.loads(json.dumps(row))) == expected


BAD = {
    "no assistant turn": (
        {"messages": said(("user", "Hello"))},
        {"messages": []},
        {"messages": said(("user", "Hello"), ("user", "Hello?"))},
    ),
    "roles out of order": (
        {"messages": said(("user", "1"), ("user", "2"), ("assistant", "3"))},
        {"messages": said(("user", "1"), ("assistant", "2"), ("assistant", "3"))},
        {"messages": said(("user", "1"), ("system", "2"), ("assistant", "3"))},
        {"messages": said(("user", "1"), ("observation", "2"), ("assistant", "3"))},
        {"messages": said(("system", "1"), ("assistant", "2"))},
    ),
    "unknown role": (
        {"messages": said(("user", "1"), ("robot", "2"), ("assistant", "3"))},
        {"messages": [{"content": "1"}, *HELLO]},
        {"messages": [{"role": ["user"], "content": "1"}, *HELLO]},
    ),
    "empty content": (
        {"messages": said(("user", ""), ("assistant", "1"))},
        {"messages": said(("user", "1"), ("assistant", " \n"))},
        {"messages": [*said(("user", "1")), {"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [*HELLO, *said(("user", "1"), ("call", ""), ("tool", "2"), ("assistant", "3"))]},
        {"messages": said(("user", "1"), ("assistant", []))},
        {"messages": said(("user", "1"), ("assistant", [part("text", "")]))},
        {"instruction": "", "input": None, "output": "1"},
        {"instruction": "1", "output": None},
        {"question": None, "answer": "1"},
        {"question": "", "choices": ["1", "2"], "answer": 0},
        {"prompt": "1", "completion": {}},
        {"question": "1", "choices": ["2", None], "answer": 0},
    ),
    "unknown part": (
        {"messages": said(("user", "1"), ("assistant", [part("image", "2")]))},
        {"messages": said(("user", "1"), ("assistant", [part("text", ["2"])]))},
        {"messages": said(("user", [{"type": "image"}]), ("assistant", "1"))},
        {"messages": said(("user", {"a": 1}), ("assistant", "1"))},
        {"messages": [*said(("user", "1")), {"role": "assistant", "content": None, "tool_calls": 1.0}]},
    ),
    "a call without a result": (
        {"messages": said(("user", "1"), ("function_call", "2"))},
        {"messages": said(("user", "1"), ("function_call", "2"), ("user", "3"), ("assistant", "4"))},
    ),
    "no message": (
        {"messages": None},
        {"messages": "Hello"},
        {"messages": ["Hello"]},
        None,
    ),
    "unknown history": (
        {"instruction": "1", "history": "2", "output": "3"},
        {"instruction": "1", "history": [["2", "3", "4"]], "output": "3"},
    ),
    "unknown weight": (
        {"messages": [HELLO[0], {**HELLO[1], "weight": 0.5}]},
        {"messages": [HELLO[0], {**HELLO[1], "train": "no"}]},
        {"instruction": "1", "input": [part("text", "2") | {"weight": 0}], "output": "3"},
        {"instruction": "1", "output": [part("text", "2"), part("text", "3") | {"train": False}]},
        {"question": "1", "answer": [part("text", "2") | {"weight": 0}]},
        {"question": "1", "choices": ["2", part("text", "3") | {"weight": 0}], "answer": 0},
        {"messages": HELLO, "weight": 0.5},
        {"prompt": "1", "response": "2", "train": "no"},
        {"question": "1", "answer": "2", "weight": float("nan"), "train": True},
    ),
    "nothing to train on": (
        {"messages": [HELLO[0], {**HELLO[1], "weight": 0}]},
        {"messages": [HELLO[0], {**HELLO[1], "train": False}]},
        {"messages": HELLO, "weight": 0},
        {"messages": [HELLO[0], {"role": "assistant", "content": [part("python_output", "1")]}]},
    ),
    "no such choice": (
        {"question": "1", "choices": ["2", "3"], "answer": 2},
        {"question": "1", "choices": ["2", "3"], "answer": -1},
        {"question": "1", "choices": ["2", "3"], "answer": "C"},
        {"question": "1", "choices": {}, "answer": 0},
    ),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_conversation_is_named_by_its_reason(reason):
    for row in BAD[reason]:
        with pytest.raises(Malformed) as caught:
            read(row)
        assert caught.value.reason == reason, row
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"text": "once"},
            r"holds no conversation \(its keys are text\); expected one of: messages, conversations, prompt \+",
        ),
        ({"prompt": "1", "chosen": "2", "rejected": "3"}, "its keys are prompt, chosen, rejected"),
        ({}, "its keys are none"),
        ([1], "is not an object"),
    ],
)
def test_a_row_of_no_format_is_refused(row, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        read(row)
    assert not isinstance(caught.value, Malformed)


def test_alpacas_template_is_the_literal_one():
    short = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHello\n\n### Response:\n"
    )
    long = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n"
    )
    assert (alpaca_prompt("Hello"), alpaca_prompt("Add.", "2 and 3")) == (short, long)
    rows = {
        short: ROWS["messages"][0],
        long: ROWS["alpaca"][0],
        alpaca_prompt("Be kind.\n\nHello"): ROWS["system beside"][0] | {"instruction": "Add."},
    }
    for expected, row in rows.items():
        prompt, answer = FORMATS["alpaca"].read(row)
        assert prompt == {"role": "user", "content": expected}
        assert answer["role"] == "assistant"
    with pytest.raises(Malformed, match="4 messages, but the Alpaca template has one question and answer"):
        FORMATS["alpaca"].read({"messages": HELLO + HELLO})


def test_braces_in_an_instruction_stay_as_they_are():
    assert "### Instruction:\nWrite {x} and {0}.\n" in alpaca_prompt("Write {x} and {0}.", "{input}")


SPECIALS = {name: 50 + i for i, name in enumerate(("user_start", "user_end", "assistant_start", "assistant_end"))}
SPECIALS |= {"python_start": 54, "python_end": 55, "output_start": 56, "output_end": 57}


def test_alpacas_answer_and_its_end_are_targets_and_its_prompt_is_not():
    letters = Letters(**SPECIALS)
    row = {"instruction": "1", "output": "23"}
    ids, loss_mask = FORMATS["alpaca"].encode(FORMATS["alpaca"].read(row), letters)
    assert ids == [0, *letters.encode(alpaca_prompt("1")), 2, 3, 53]
    assert [number for number, learn in zip(ids, loss_mask) if learn] == [2, 3, 53]


def test_a_conversation_of_files_has_a_hand_written_mask():
    row = {"system": "1", "question": "2", "answer": "3<<4=5>>6"}
    del row["system"]
    ids, loss_mask = FORMATS["chat"].encode(read(row), Letters(**SPECIALS))
    assert ids == [0, 50, 2, 51, 52, 3, 54, 4, 55, 56, 5, 57, 6, 53]
    assert [int(learn) for learn in loss_mask] == [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1]


def test_the_words_of_a_conversation_are_all_that_is_said():
    messages = read(ROWS["gsm8k"][0])
    assert words(messages) == "How many?\n48/2 = 48/22424 in May.\n21+1\n#### 24"
    assert opening(read(ROWS["system beside"][0])) == "Hello"
    assert words(read({"prompt": "\ud800", "response": "1"})) == "\ufffd\n1"


@pytest.mark.parametrize("spec", ["tinyworld:chat:0", "tinyworld:chats", "tinyworld:train"])
def test_a_wrong_tiny_world_is_refused(spec):
    with pytest.raises(UserError, match="is not tinyworld:chat"):
        find(spec, "train", "objects")


def test_the_tiny_worlds_talk_is_dealt_without_loss_and_by_split(monkeypatch):
    def conversation(split, index):
        return said(("user", f"{split} {index}"), ("assistant", "Hi"))

    monkeypatch.setattr(tinyworld, "CONVERSATIONS", {"train": 7, "val": 3})
    monkeypatch.setattr(tinyworld, "conversation", conversation)
    for spec, split, count in (
        ("tinyworld:chat", "train", 7),
        ("tinyworld:chat", "val", 3),
        ("tinyworld:chat:5", "train", 5),
    ):
        (source,) = find(spec, split, "objects")
        begun = [
            example.opening
            for part in range(3)
            for example in FORMATS["chat"].examples(source, Reading(part=part, parts=3), None)
        ]
        assert sorted(begun) == [f"{split} {i}" for i in range(count)]
    sources = [KINDS["tinyworld"].hash(*find("tinyworld:chat:5", split, "objects")) for split in ("train", "val")]
    assert sources[0] != sources[1]


def test_talk_does_not_change_the_documents_of_the_tiny_world(monkeypatch, tmp_path):
    for name in ("__init__.py", "world.py", "talk.py"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(tinyworld, "__file__", str(tmp_path / "__init__.py"))
    specs = "tinyworld:train:5", "tinyworld:chat-train:5"
    document, chat = (partial(KINDS["tinyworld"].hash, Source("tinyworld", spec, 1)) for spec in specs)
    before = document(), chat()
    (tmp_path / "talk.py").write_text("2")
    assert document() == before[0]
    assert chat() != before[1]
    (tmp_path / "world.py").write_text("2")
    assert document() != before[0]
