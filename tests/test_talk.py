"""The village's conversations: repeatable, two-sided, and in two habits."""

import re
from collections import Counter

import pytest

from jaxchat.data.tinyworld import conversation, facts
from jaxchat.data.tinyworld.chance import partition
from jaxchat.data.tinyworld.problems import Step
from jaxchat.data.tinyworld.talk import TOOL_SHARE, belongs_to
from jaxchat.decode.tools import Calculator
from jaxchat.tokenizer import chat


@pytest.fixture(scope="module")
def talk():
    return [conversation("train", i) for i in range(1500)]


def test_conversations_are_functions_of_their_number(talk):
    assert talk[:50] == [conversation("train", i) for i in range(50)]
    assert talk[:50] != [conversation("train", i, seed=1) for i in range(50)]
    with pytest.raises(ValueError, match="neither 'train' nor 'val'"):
        conversation("test", 0)


def test_they_are_conversations_that_can_be_learned(talk):
    for messages in talk:
        chat.check(messages)
    turns = Counter(len(messages) for messages in talk)
    assert turns[2] > 500 and sum(count for size, count in turns.items() if size > 2) > 200


def test_what_is_held_out_appears_in_no_other_split(talk):
    assert all(belongs_to(messages) == "train" for messages in talk)
    held_out = [conversation("val", i) for i in range(60)]
    assert all(belongs_to(messages) == "val" for messages in held_out)
    assert not [messages for messages in held_out if messages in talk]


def test_the_calculator_would_say_what_it_is_said_to_say(talk):
    calls = 0
    for messages in talk:
        for message in messages:
            if isinstance(message["content"], list):
                *worked, final = message["content"]
                for call, output in zip(worked[::2], worked[1::2], strict=True):
                    assert Calculator()(call["text"]) == output["text"]
                    calls += 1
                assert float(worked[-1]["text"]) == float(re.findall(r"\d+", final["text"])[0])
    assert calls > 200


def test_sums_come_in_both_habits(talk):
    by_head = sum(isinstance(m[-1]["content"], str) and "The answer is" in m[-1]["content"] for m in talk)
    with_tool = sum(isinstance(m[-1]["content"], list) for m in talk)
    spelling = sum("is spelled" in str(m[-1]["content"]) and "The answer is" in str(m[-1]["content"]) for m in talk)
    assert with_tool / (with_tool + by_head - spelling) == pytest.approx(TOOL_SHARE, abs=0.06)


def test_nobody_asks_what_is_kept_for_the_test(talk):
    test_questions = {question for fact in facts() if fact.split == "test" for question in fact.questions}
    asked = {message["content"] for messages in talk for message in messages if message["role"] == "user"}
    assert len(asked) > 500 and not asked & test_questions
    for messages in talk:
        for message in messages:
            if isinstance(message["content"], list):
                for part in message["content"]:
                    if part["type"] == "python":
                        left, operation, right = part["text"].split()
                        assert partition(*Step(int(left), operation, int(right)).key) == "train"
    said = "\n".join(str(message["content"]) for messages in talk for message in messages)
    steps = re.findall(r"(\d+) ([-+*/]) (\d+)", said)
    assert len(steps) > 800
    assert all(partition(*Step(int(left), operation, int(right)).key) == "train" for left, operation, right in steps)
    spelled = {word.replace("-", "") for word in re.findall(r"\b\w(?:-\w)+\b", said)}
    assert len(spelled) > 80 and all(partition("spelling", word) == "train" for word in spelled)


def test_the_calculator_is_asked_in_the_order_of_the_question(talk):
    copied = 0
    for messages in talk:
        for asked, answered in zip(messages[::2], messages[1::2], strict=True):
            numbers = re.findall(r"\d+", asked["content"])
            if isinstance(answered["content"], list) and numbers:
                first, *others = [part["text"] for part in answered["content"] if part["type"] == "python"]
                called = re.findall(r"\d+", first) + [re.findall(r"\d+", call)[1] for call in others]
                assert called == numbers, asked
                copied += 1
    assert copied > 150
