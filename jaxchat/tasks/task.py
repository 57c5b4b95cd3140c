"""Interface of tasks: problems, and scores of answers. To add your own task, write a file like this, doubling.py:

    from jaxchat.tasks import Problem, Score


    class Doubling:
        name = "doubling"
        tools = ()

        def problems(self, split):
            return [Problem.ask(f"What is twice {i}?", str(2 * i)) for i in range(split == "test", 200, 2)]

        def score(self, problem, text):
            return Score(strict=text == problem.answer, lenient=problem.answer in text.replace(".", " ").split())

After the stages pretrain and sft of configs/tiny.py, these train and evaluate on it:

    python -m launch.train --config=configs/tiny.py:rl --rl.tasks doubling.py:Doubling
    python -m launch.evaluate --checkpoint=runs/tiny/sft --tasks doubling.py:Doubling
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

Split = Literal["train", "test"]


class Problem(NamedTuple):
    """Messages, the last from the user, the right answer, and an optional kind."""

    messages: Sequence[Mapping[str, Any]]
    answer: str
    kind: str = ""

    @classmethod
    def ask(cls, question: str, answer: str, kind: str = "") -> "Problem":
        """Builds a problem with a single user message."""
        return cls([{"role": "user", "content": question}], answer, kind)

    @property
    def question(self) -> str:
        return str(self.messages[-1]["content"])


class Score(NamedTuple):
    """`strict`: the answer is right and in the required format. `lenient`: it is right in any format."""

    strict: bool
    lenient: bool


class Task(Protocol):
    """Training and test problems, which must be disjoint, and a score for answers.

    Optional attributes: `score_many(answers)` takes (problem, text) pairs and returns a score or an exception for each;
    `stop` lists texts that end a base model's answer, by default the end of the line; `shuffled` is true if the order
    of the problems is random, so that a limit takes the first instead of a sample; `notice` is a sentence that is
    logged before the task is used; `judged_by` is what scores depend on besides the problems and the code, as a text:
    recorded answers are judged again when it changes.
    """

    @property
    def name(self) -> str: ...

    @property
    def tools(self) -> Sequence[str]:
        """Names of the tools that answers may call, such as "calculator"."""

    def problems(self, split: Split) -> Sequence[Problem]: ...

    def score(self, problem: Problem, text: str) -> Score:
        """Scores the text of an answer, which includes tool calls and outputs but no special tokens."""
