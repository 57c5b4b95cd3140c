"""Tasks from the built-in village: arithmetic, spelling and facts. Train and test are disjoint by construction."""

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
    """Word problems with one or two steps. Test problems contain a number fact that occurs in no training text."""

    name = "arithmetic"
    tools = ("calculator",)
    shuffled = True

    def problems(self, split: Split) -> list[Problem]:
        return _problems(split, ("word", "word", "steps"))

    def score(self, problem: Problem, text: str) -> Score:
        """Strict scoring requires the text to end with "The answer is N."; lenient scoring takes the last number."""
        final, right = _NUMBER.search(text.rstrip()), read_number(problem.answer)
        strict = final is not None and int(final[1]) == right
        return Score(strict, strict or last_number(text) == right)


class Spelling:
    """Questions about the letters of words: spelling, counting, first and last letter."""

    name = "spelling"
    tools = ()
    shuffled = True

    def problems(self, split: Split) -> list[Problem]:
        return _problems(split, ("spelling",))

    def score(self, problem: Problem, text: str) -> Score:
        """Strict scoring requires the training text's final sentence; lenient scoring takes the last word."""
        words, final = re.findall(r"[\w-]+", text), _WORD.search(text.rstrip())
        last = bool(words) and words[-1] == problem.answer
        if "-" in problem.answer:
            return Score(text.rstrip().endswith(f"is spelled {problem.answer}."), last)
        return Score(final is not None and final[1] == problem.answer, last)


class Facts:
    """Questions about the village. The text answers the test questions, but no training example asks them."""

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
        """Strict scoring requires the value in the first sentence, lenient anywhere. Only whole words match."""
        value = problem.answer
        spellings = (value, number_word(int(value))) if value.isdecimal() else (value,)
        first, whole = _words(text.partition(".")[0]), _words(text)
        return Score(*(any(_words(spelling) in part for spelling in spellings) for part in (first, whole)))


def _words(text: str) -> str:
    """The words of a text in lower case, with a space before and after each."""
    return " ".join(["", *re.findall(r"[\w'-]+", text.lower()), ""])


@cache
def _problems(split: Split, kinds: tuple[Kind, ...]) -> list[Problem]:
    """Problems of a split: COUNTS, or all if the village has fewer."""
    problems: list[Problem] = []
    with contextlib.suppress(ValueError):
        for problem in tinyworld.problems(split, COUNTS[split], kinds=kinds):
            problems.append(Problem.ask(problem.question, problem.answer, problem.kind))
    return problems
