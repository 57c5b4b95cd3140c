"""Conversations about the village, for a chat model: facts, sums, spelling, small talk.

Sums are answered in two habits, drawn at random: worked in the head, as the village's text does, or with the
calculator. A model that imitates learns both; which of them gives right answers with numbers that were never seen is
left to be found out. Nobody asks here what the test side of `facts` and `problems` holds.
"""

import random
import re
from functools import cache
from typing import Any

from jaxchat.data.tinyworld import world
from jaxchat.data.tinyworld.chance import between, pick, seeded, stable_hash
from jaxchat.data.tinyworld.facts import Fact, facts
from jaxchat.data.tinyworld.problems import Problem, draw_problem

CONVERSATIONS = {"train": 16_000, "val": 400}
VAL_SHARE = 16  # one conversation in so many may only appear in val
TOOL_SHARE = 0.4  # of sums are answered with the calculator

Message = dict[str, Any]

GREETINGS = (
    ("Hello!", "Hello! What would you like to know about Pebble Bay?"),
    ("Good morning.", "Good morning! It is a fine day in the village."),
    ("Hi, who are you?", "I am a small model who knows the village of Pebble Bay."),
    ("Can you help me?", "Yes, gladly. Ask me about the village, or give me a sum."),
    ("Thank you!", "You are welcome."),
    ("Goodbye.", "Goodbye! Come back soon."),
    ("What can you do?", "I can tell you about the village, do sums and spell words."),
)
_STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")


def conversation(split: str, index: int, seed: int = 0) -> list[Message]:
    """Conversation `index` of `train` or `val`: written again until its words fall on that side."""
    if split not in CONVERSATIONS:
        raise ValueError(f"split={split!r} is neither 'train' nor 'val'")
    rng = seeded("conversation", seed, split, index)
    writer = pick(rng, _WRITERS)
    while True:
        messages = writer(rng)
        if belongs_to(messages) == split:
            return messages


def belongs_to(messages: list[Message]) -> str:
    """The only split in which a conversation with these words may appear."""
    return "val" if stable_hash("conversation", repr(messages)) % VAL_SHARE == 0 else "train"


def worked_with_calculator(problem: Problem) -> list[Message]:
    """A sum's answer as the parts of a message: every step of its solution asked of the calculator."""
    parts: list[Message] = []
    for left, operation, right, result in _STEP.findall(problem.solution):
        parts.append({"type": "python", "text": f"{left} {operation} {right}"})
        parts.append({"type": "python_output", "text": result})
    return [*parts, {"type": "text", "text": f"The answer is {problem.answer}."}]


def _sum(rng: random.Random) -> list[Message]:
    problem = draw_problem(rng, pick(rng, ("sum", "word", "word", "steps")), "train")
    answer: Any = worked_with_calculator(problem) if rng.random() < TOOL_SHARE else problem.solution
    return _turns((problem.question, answer))


def _spelling(rng: random.Random) -> list[Message]:
    problem = draw_problem(rng, "spelling", "train")
    return _turns((problem.question, problem.solution))


def _facts(rng: random.Random) -> list[Message]:
    """One question, or a few about the same person, animal, place or thing."""
    first = pick(rng, _asked())
    near = [fact for fact in _asked() if fact.subject == first.subject and fact is not first]
    chosen = [first, *near[: between(rng, 0, 2)]]
    return _turns(*((pick(rng, fact.questions), fact.state(between(rng, 0, len(fact.forms) - 1))) for fact in chosen))


def _small_talk(rng: random.Random) -> list[Message]:
    """A greeting, and often a question after it."""
    turns: list[tuple[str, Any]] = [pick(rng, GREETINGS[:4])]
    if rng.random() < 0.8:
        person = pick(rng, tuple(world.PEOPLE))
        known = [fact for fact in _asked() if fact.subject == person]
        if known:
            fact = pick(rng, known)
            turns.append((pick(rng, fact.questions), fact.state(0)))
    if rng.random() < 0.5:
        turns.append(pick(rng, GREETINGS[4:]))
    return _turns(*turns)


# How many conversations in a hundred.
MIXTURE = ((_sum, 56), (_facts, 28), (_spelling, 8), (_small_talk, 8))
_WRITERS = tuple(writer for writer, share in MIXTURE for _ in range(share))


@cache
def _asked() -> tuple[Fact, ...]:
    return tuple(fact for fact in facts() if fact.split == "train")


def _turns(*turns: tuple[str, Any]) -> list[Message]:
    return [
        {"role": role, "content": content}
        for asked, answer in turns
        for role, content in (("user", asked), ("assistant", answer))
    ]
