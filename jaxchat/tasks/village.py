"""Tasks drawn from the embedded world: sums, spelling and facts; train and test disjoint by construction."""

import contextlib
import re
from functools import cache

from jaxchat.data import tinyworld
from jaxchat.data.tinyworld.problems import Kind
from jaxchat.tasks.numbers import last_number, same_number
from jaxchat.tasks.task import Problem, Score, Split

COUNTS = {"train": 8_000, "test": 2_048}
_FINAL = re.compile(r"The answer is ([^.]+)\.$")


class Arithmetic:
    """Problems in words, of one step and of two; half the numbers are facts that no training text holds."""

    name = "arithmetic"
    tools = ("calculator",)

    def problems(self, split: Split) -> list[Problem]:
        return _problems(split, ("word", "word", "steps"))

    def score(self, problem: Problem, text: str) -> Score:
        """Strict wants the text to end with "The answer is N."; lenient takes the last number."""
        final, last = _FINAL.search(text.rstrip()), last_number(text)
        strict = final is not None and same_number(final[1], problem.answer)
        return Score(strict, strict or (last is not None and same_number(last, problem.answer)))


class Spelling:
    """Letters of words: spelled out, counted, the first and the last."""

    name = "spelling"
    tools = ()

    def problems(self, split: Split) -> list[Problem]:
        return _spellings(split)

    def score(self, problem: Problem, text: str) -> Score:
        """Strict wants the village's own sentence; lenient the answer as the last word."""
        words = re.findall(r"[\w-]+", text)
        last = bool(words) and words[-1] == problem.answer
        final = _FINAL.search(text.rstrip())
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
        """Strict wants the value in the first sentence; lenient anywhere."""
        value = problem.answer.lower()
        return Score(value in text.partition(".")[0].lower(), value in text.lower())


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
