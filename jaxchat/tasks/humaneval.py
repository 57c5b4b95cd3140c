"""HumanEval (arXiv:2107.03374): functions to be written from head and docstring, judged by running them."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jaxchat.errors import UserError
from jaxchat.sandbox.run import Job, Limits, SandboxError, Verdict, find_protection, judge_many
from jaxchat.tasks.files import read_rows
from jaxchat.tasks.task import Problem, Score, Split

# Where a base model's continuation of a function ends: at the next thing that is not indented (lm-eval's task).
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class Row(NamedTuple):
    """One function: its head, its name, a solution (the body alone) and the text of a test, `check(candidate)`."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


class HumanEval:
    """The problems of HumanEval.jsonl[.gz] in a directory; without one, of the hub. They are for testing alone."""

    name = "humaneval"
    tools = ()
    stop = STOP

    def __init__(self, directory: str = "", downloads: Path | None = None, *, limits: Limits | None = None) -> None:
        self._directory, self._downloads, self._limits = directory, downloads, limits or Limits()

    def problems(self, split: Split) -> list[Problem]:
        """A head as the user's words, as in nanochat's chat form; a solution, its head included, as the answer."""
        if split == "train":
            raise UserError("humaneval has no problems to learn from: it is for testing")
        return [Problem.ask(row.prompt, row.prompt + row.canonical_solution) for row in self._rows.values()]

    @cached_property
    def _rows(self) -> dict[str, Row]:
        return {row.prompt: row for row in self._read()}

    def _read(self) -> Iterator[Row]:
        for where, row in read_rows(self.name, "HumanEval.jsonl", self._directory, self._downloads, "val"):
            yield _row(row, where)

    def score(self, problem: Problem, text: str) -> Score:
        """Right, strictly and leniently, is a program that passes the test.

        Raises:
            SandboxError: the program could not be judged, through no fault of its own.
        """
        (score,) = self.score_many([(problem, text)])
        if isinstance(score, SandboxError):
            raise score
        return score

    def score_many(self, answers: Sequence[tuple[Problem, str]]) -> list[Score | SandboxError]:
        """Scores in the order of the answers, several judged at once; an error for one that could not be judged."""
        return [
            SandboxError(verdict.reason) if verdict.verdict == "broken" else Score(*[verdict.verdict == "right"] * 2)
            for verdict in self.verdicts(answers)
        ]

    def verdicts(self, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """What the sandbox says of each answer, with its reason."""
        rows = [self._rows[problem.question] for problem, _ in answers]
        jobs = [
            Job(program(row.prompt, row.entry_point, text), row.entry_point, row.test, row.prompt)
            for row, (_, text) in zip(rows, answers)
        ]
        return judge_many(jobs, self._limits)

    @property
    def notice(self) -> str:
        """What protects this machine from the answers."""
        return find_protection().sentence


def check_sandbox(directory: str) -> dict[str, Any]:
    """What protects this machine from answers, and how many of the problems' own solutions are judged right."""
    task, protection = HumanEval(directory), find_protection()
    problems = task.problems("test")
    verdicts = task.verdicts([(problem, problem.answer) for problem in problems])
    return {
        "protection": protection.sentence,
        "not_held": list(protection.holes),
        "problems": len(problems),
        "right": sum(verdict.verdict == "right" for verdict in verdicts),
    }


def program(prompt: str, entry_point: str, text: str) -> str:
    """The program that an answer means.

    Of fenced blocks the first that defines the function counts, else the first; without any, the whole text. Code that
    defines the function has what stands before it in the prompt put before it, imports and helpers; other code
    goes on where the prompt ends.
    """
    definition = re.compile(rf"^def[ \t]+{re.escape(entry_point)}\b", re.MULTILINE)
    blocks = _FENCE.findall(text)
    code = next((block for block in blocks if definition.search(block)), blocks[0] if blocks else text)
    if not definition.search(code):
        return prompt + code
    heads = list(definition.finditer(prompt))
    return prompt[: heads[-1].start() if heads else 0] + "\n" + code


def _row(row: Any, where: str) -> Row:
    """The problem of a row, checked."""
    try:
        found = Row(*(row[name] for name in Row._fields))
    except (KeyError, TypeError):
        raise UserError(f"{where} is no object with {', '.join(Row._fields)}") from None
    if not all(isinstance(part, str) for part in found):
        raise UserError(f"{where} has a field that is no text")
    return found
