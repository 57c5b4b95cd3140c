"""Generated conversations, with nulls, parts, calls and weights anywhere: read, or skipped for a counted reason.

Nothing of weight 0 is a training target, and no null becomes a word.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import Letters

from jaxchat.data.formats import FORMATS
from jaxchat.tokenizer.chat import Malformed
from jaxchat.tokenizer.chat_format import NANOCHAT

REASONS = {
    "no message",
    "no assistant turn",
    "roles out of order",
    "unknown role",
    "empty content",
    "unknown part",
    "a call without a result",
    "unknown weight",
    "unknown history",
    "nothing to train on",
    "no such choice",
    "several turns",
}
NAMES = [name.strip("<|>") for name in NANOCHAT.specials[1:]]
LETTERS = Letters(**{name: 80 + i for i, name in enumerate(NAMES)})
ZERO = "ZERO"  # the text of what has weight 0, and of nothing else

values = st.sampled_from([None, "", "x", " ", 0, 5, 1.5, True, [], {}, [1], {"a": None}, "y"])
parts = st.one_of(
    st.sampled_from([None, "q", {"type": "text", "text": ZERO, "weight": 0}]),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["text", "image", "input_text", "python", "python_output", None]),
            "text": st.sampled_from(["t", None, "", 3]),
        }
    ),
)
zeros = st.sampled_from([ZERO, [{"type": "text", "text": ZERO}], [{"type": "python_output", "text": ZERO}], None])
contents = st.one_of(st.sampled_from(["a", "b", "c"]), values, st.lists(parts, max_size=3))
functions = st.fixed_dictionaries({"name": st.just("f"), "arguments": st.sampled_from(["{}", {}, None])})
call_objects = st.one_of(
    functions, st.fixed_dictionaries({"function": functions, "id": st.sampled_from(["1", "2", None])})
)
calls = st.one_of(
    call_objects,
    functions.map(json.dumps),
    st.lists(call_objects, min_size=1, max_size=2),
    st.lists(functions, max_size=2).map(json.dumps),
    st.sampled_from([None, 3, [None]]),
)
ROLES = [
    "user",
    "assistant",
    "gpt",
    "human",
    "system",
    "developer",
    "tool",
    "function_call",
    "observation",
    "robot",
    None,
]


@st.composite
def messages(draw: Any) -> dict[str, Any]:
    """A message of any role, with any of the keys that have a meaning."""
    message = {"role": None, "from": None} if draw(st.booleans()) else {}
    message[draw(st.sampled_from(["role", "from"]))] = draw(st.sampled_from(ROLES))
    weight = draw(st.sampled_from([None, None, None, 1, 0, 0.5, False]))
    if weight is not None:
        message[draw(st.sampled_from(["weight", "train", "training", "loss"]))] = weight
    excluded = weight is not None and not weight
    message |= {"content": None, "value": None} if draw(st.booleans()) else {}
    message[draw(st.sampled_from(["content", "value"]))] = draw(zeros if excluded else contents)
    if draw(st.booleans()):
        key = draw(st.sampled_from(["tool_calls", "function_call"]))
        message[key] = [{"id": "1", "function": ZERO}] if excluded else draw(calls)
    if draw(st.booleans()):
        message["tool_call_id"] = draw(st.sampled_from(["1", "2", None]))
    return message


def said(role: str, content: st.SearchStrategy = contents, **more: st.SearchStrategy) -> st.SearchStrategy:
    return st.fixed_dictionaries({"role": st.just(role), "content": content, **more})


called = said("assistant", values, tool_calls=calls)
turns = st.one_of(
    st.tuples(said("user"), said("assistant")),
    st.tuples(said("user"), called, said("tool"), said("assistant")),
    st.tuples(
        said("user"),
        st.fixed_dictionaries({"role": st.just("assistant"), "content": st.just(ZERO), "weight": st.just(0)}),
    ),
    st.tuples(messages()),
)
conversations = st.lists(turns, max_size=4).map(lambda found: [message for turn in found for message in turn])
beside = st.one_of(
    st.dictionaries(st.sampled_from(["system", "tools", "weight", "train", "history"]), values, max_size=1),
    st.fixed_dictionaries({"tools": st.one_of(calls, contents)}),
    st.fixed_dictionaries({"history": st.one_of(conversations, st.lists(st.tuples(contents, contents).map(list)))}),
)
rows = st.one_of(
    st.builds(
        lambda key, said, more: {key: said, **more},
        st.sampled_from(["messages", "conversations"]),
        conversations,
        beside,
    ),
    st.builds(
        lambda first, keys, more: {**dict(zip(keys, first)), **more},
        st.lists(contents, min_size=3, max_size=3),
        st.sampled_from([("instruction", "output", "input"), ("question", "answer", "choices")]),
        beside,
    ),
    st.builds(
        lambda prompt, answer, more: {"prompt": prompt, "completion": answer, **more},
        st.one_of(conversations, messages(), contents),
        st.one_of(conversations, messages(), contents),
        beside,
    ),
)


def outcome(row: Mapping[str, Any], form: str, tokenizer: Any = LETTERS) -> str:
    """ "read", or the reason for which a row is skipped; asserts what holds for every row."""
    try:
        found = FORMATS[form].read(row)
    except Malformed as error:
        assert error.reason in REASONS and "\n" not in str(error), row
        return error.reason
    assert "None" not in json.dumps(found) or "None" in json.dumps(row), row
    for everything in (False, True):
        ids, mask = FORMATS[form].encode(found, tokenizer, everything)
        assert len(ids) == len(mask) and any(mask[1:]), row
        targets = [number if learn else tokenizer.bos for number, learn in zip(ids, mask)]
        if ZERO in json.dumps(row):
            learned = "".join(chr(48 + number) if 0 < number < 80 else "|" for number in targets)
            assert "".join(chr(48 + number) for number in LETTERS.encode(ZERO)) not in learned, row
    return "read"


def check(examples: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, database=None)
    @given(row=rows)
    def run(row: Mapping[str, Any]) -> None:
        outcomes.update(outcome(row, form) for form in ("chat", "alpaca"))

    run()
    return outcomes


def test_generated_conversations_are_read_or_skipped_for_a_reason() -> None:
    outcomes = check(300)
    assert outcomes["read"] > 30 and len(outcomes) > 5, outcomes


@pytest.mark.nightly
def test_ten_thousand_generated_conversations_are_too() -> None:
    outcomes = check(10_000)
    assert len(outcomes) > 10, outcomes
