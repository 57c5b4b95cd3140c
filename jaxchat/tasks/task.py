"""A task: problems, and whether an answer to one is right. One file with such a class is all that your own needs.

    class Doubling:
        name = "doubling"
        tools = ()

        def problems(self, split):
            return [Problem.ask(f"What is twice {i}?", str(2 * i)) for i in range(split == "test", 200, 2)]

        def score(self, problem, text):
            return Score(strict=text == problem.answer, lenient=problem.answer in text)

`python -m launch.train --config=configs/tiny.py:rl --rl.tasks doubling.py:Doubling` learns it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

Split = Literal["train", "test"]


class Problem(NamedTuple):
    """Messages that end with the user's, the right answer, and what kind of problem it is."""

    messages: Sequence[Mapping[str, Any]]
    answer: str
    kind: str = ""

    @classmethod
    def ask(cls, question: str, answer: str, kind: str = "") -> "Problem":
        """A problem of one question."""
        return cls([{"role": "user", "content": question}], answer, kind)

    @property
    def question(self) -> str:
        return str(self.messages[-1]["content"])


class Score(NamedTuple):
    """Whether an answer is right and put as asked for, and whether it is right at all."""

    strict: bool
    lenient: bool


class Task(Protocol):
    """Problems for learning and for testing, different ones, and their judge.

    A task may also have `score_many(answers)`, which takes pairs of problem and text and gives for each a score, or the
    exception that stands for one; `stop`, the texts that end a base model's answer, by default the end of the line;
    and `notice`, a sentence that is said before it is used.
    """

    @property
    def name(self) -> str: ...

    @property
    def tools(self) -> Sequence[str]:
        """Names of the tools that may be called, such as "calculator"."""

    def problems(self, split: Split) -> Sequence[Problem]: ...

    def score(self, problem: Problem, text: str) -> Score:
        """Judges the text of an answer: all its words, those of calls and tools among them, without special tokens."""
