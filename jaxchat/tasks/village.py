"""Tasks drawn from the embedded world: sums, spelling and facts; train and test disjoint by construction."""

import contextlib
import re
from functools import cache

from jaxchat.data import tinyworld
from jaxchat.data.tinyworld.english import number_word
from jaxchat.data.tinyworld.problems import Kind
from jaxchat.tasks.numbers import last_number, read_number
from jaxchat.tasks.task import Problem, Score, Split

COUNTS = {"train": 8_000, "test": 2_048}
_NUMBER = re.compile(r"The answer is (\d{1,9})\.$")
_WORD = re.compile(r"The answer is (\w+)\.$")


class Arithmetic:
    """Problems in words, of one step and of two; half the numbers are facts that no training text holds."""

    name = "arithmetic"
    tools = ("calculator",)

    def problems(self, split: Split) -> list[Problem]:
        return _problems(split, ("word", "word", "steps"))

    def score(self, problem: Problem, text: str) -> Score:
        """Strict wants the text to end with "The answer is N."; lenient takes the last number."""
        final, right = _NUMBER.search(text.rstrip()), read_number(problem.answer)
        strict = final is not None and int(final[1]) == right
        return Score(strict, strict or last_number(text) == right)


class Spelling:
    """Letters of words: spelled out, counted, the first and the last."""

    name = "spelling"
    tools = ()

    def problems(self, split: Split) -> list[Problem]:
        return _spellings(split)

    def score(self, problem: Problem, text: str) -> Score:
        """Strict wants the village's own sentence; lenient the answer as the last word."""
        words, final = re.findall(r"[\w-]+", text), _WORD.search(text.rstrip())
        last = bool(words) and words[-1] == problem.answer
        if "-" in problem.answer:
            return Score(text.rstrip().endswith(f"is spelled {problem.answer}."), last)
        return Score(final is not None and final[1] == problem.answer, last)


class Facts:
    """Questions about the village. Those of the test side are answered in the text, but asked nowhere in training."""

    name = "facts"
    tools = ()

    def problems(self, split: Split) -> list[Problem]:
        return [
            Problem.ask(question, fact.value, fact.relation)
            for fact in tinyworld.facts()
            if fact.split == split
            for question in fact.questions
        ]

    def score(self, problem: Problem, text: str) -> Score:
        """Strict wants the value in the first sentence; lenient anywhere. Whole words count: 8 is not in 38."""
        value = problem.answer
        ways = (value, number_word(int(value))) if value.isdecimal() else (value,)
        first, whole = _words(text.partition(".")[0]), _words(text)
        return Score(*(any(_words(way) in part for way in ways) for part in (first, whole)))


def _words(text: str) -> str:
    """The words of a text in small letters, with a space around each."""
    return " ".join(["", *re.findall(r"[\w'-]+", text.lower()), ""])


@cache
def _problems(split: Split, kinds: tuple[Kind, ...]) -> list[Problem]:
    drawn = tinyworld.problems(split, COUNTS[split], kinds=kinds)
    return [Problem.ask(problem.question, problem.answer, problem.kind) for problem in drawn]


@cache
def _spellings(split: Split) -> list[Problem]:
    """Every spelling problem of a side: the world has few."""
    found: list[Problem] = []
    with contextlib.suppress(ValueError):
        for problem in tinyworld.problems(split, COUNTS[split], kinds=("spelling",)):
            found.append(Problem.ask(problem.question, problem.answer, problem.kind))
    return found
