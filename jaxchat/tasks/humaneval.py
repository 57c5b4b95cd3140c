"""HumanEval (arXiv:2107.03374): functions to complete from signature and docstring, judged by running their tests."""

import re
import textwrap
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt

from jaxchat.errors import UserError
from jaxchat.sandbox.run import Job, Limits, SandboxError, Verdict, find_protection, judge_many
from jaxchat.tasks.files import FromFiles
from jaxchat.tasks.task import Problem, Score, Split

# Stop texts for base models, as in lm-eval: a function ends where the next unindented statement begins.
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# A fence after other text in its line, which Markdown does not know. List and quote markers may stand before a fence.
_FENCE_IN_LINE = re.compile(
    r"^(?!(?:[ \t]*(?:[-*+>]|\d+[.)]))+[ \t]*```)((?:(?!```).)*\S[ \t]*)(?<!`)(```+[ \t]*[\w+#.-]*[ \t]*)$",
    re.MULTILINE,
)
_LINES = re.compile(r"^[ \t]*(```++|~~~++).*\n((?:.*\n)*?)(?= {0,3}\1|\Z)", re.MULTILINE)  # Fences, whatever is around.
_ONE_LINE = re.compile(r"(```+)(?:[ \t]*py(?:thon)?3?\b)?[ \t]*([^`\n]+?)[ \t]*\1", re.IGNORECASE)
_BODY = re.compile(r"\s*?^[ \t]{2,}(?![ \t`~])", re.MULTILINE)  # A text that begins with an indented statement.


class Row(NamedTuple):
    """A problem: `prompt` is signature and docstring, `canonical_solution` the body, `test` code that defines
    `check(candidate)`."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


class HumanEval(FromFiles):
    """HumanEval, read from HumanEval.jsonl[.gz] in a directory, by default from the hub. There is no train split."""

    name = "humaneval"
    tools = ()
    stop = STOP

    def __init__(self, directory: str = "", downloads: Path | None = None, *, limits: Limits | None = None) -> None:
        super().__init__(directory, downloads)
        self._limits = limits or Limits()

    def problems(self, split: Split) -> list[Problem]:
        """The question is the prompt, as in nanochat's chat format; the answer is the whole reference solution."""
        if split == "train":
            raise UserError("humaneval has no training problems: use it for evaluation only")
        return [Problem.ask(row.prompt, row.prompt + row.canonical_solution) for row in self._rows.values()]

    @cached_property
    def _rows(self) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for where, read in self._read("HumanEval.jsonl", "val"):
            row = _row(read, where)
            if (first := rows.setdefault(row.prompt, row)) is not row:
                raise UserError(f"{where}: {row.task_id} has the prompt of {first.task_id}: remove one of them")
        return rows

    def score(self, problem: Problem, text: str) -> Score:
        """Strict and lenient scores are the same: whether the program passes its test.

        Raises:
            SandboxError: the sandbox failed to judge the program.
        """
        (score,) = self.score_many([(problem, text)])
        if isinstance(score, SandboxError):
            raise score
        return score

    def score_many(self, answers: Sequence[tuple[Problem, str]]) -> list[Score | SandboxError]:
        """Scores answers in parallel, in order; a SandboxError stands for an answer that could not be judged."""
        return [
            SandboxError(verdict.reason) if verdict.verdict == "broken" else Score(*[verdict.verdict == "right"] * 2)
            for verdict in self.verdicts(answers)
        ]

    def verdicts(self, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Sandbox verdict and reason for each answer."""
        rows = [self._rows[problem.question] for problem, _ in answers]
        jobs = [
            Job(program(row.prompt, row.entry_point, text), row.entry_point, row.test, row.prompt)
            for row, (_, text) in zip(rows, answers)
        ]
        return judge_many(jobs, self._limits)

    @property
    def judged_by(self) -> str:
        """The tests."""
        return "\0".join(f"{row.entry_point}\0{row.test}" for row in self._rows.values())

    @property
    def notice(self) -> str:
        """Sentence on the sandbox that protects this machine from the generated programs."""
        return find_protection().sentence


def check_sandbox(directory: str) -> dict[str, Any]:
    """Describes the sandbox and counts the reference solutions that it judges right, for launch.evaluate."""
    task = HumanEval(directory)
    try:
        problems = task.problems("test")
    except UserError as error:
        raise UserError(str(error).replace("humaneval:DIRECTORY", "--sandbox_check=DIRECTORY")) from None
    protection = find_protection()
    verdicts = task.verdicts([(problem, problem.answer) for problem in problems])
    return {
        "protection": protection.sentence,
        "not_held": list(protection.holes),
        "problems": len(problems),
        "right": sum(verdict.verdict == "right" for verdict in verdicts),
    }


def program(prompt: str, entry_point: str, text: str) -> str:
    """Extracts the program from an answer.

    The code is the first fenced block that defines the function; else the text before the first fence, if it defines
    the function or begins with an indented line; else the first fenced block, else the whole text. Code that defines
    the function follows the prompt's imports and helpers; other code continues the whole prompt.
    """
    definition = re.compile(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b", re.MULTILINE)
    blocks = _fenced(text)
    before = re.split(r"^(?:```|~~~)", text, maxsplit=1, flags=re.MULTILINE)[0]
    unfenced = [before] if definition.search(before) or _BODY.match(before) else []
    unlisted = (match[2] for match in _LINES.finditer(text))  # Code whose indentation ends the list of its fence.
    in_line = (match[2] for match in _ONE_LINE.finditer(text))
    found = (*blocks, *map(textwrap.dedent, blocks), *unlisted, *in_line)
    defining = (block for block in found if definition.search(block))
    code = next(defining, [*unfenced, *blocks, text][0])
    if not definition.search(code):
        return prompt + code
    signatures = list(definition.finditer(prompt))
    return prompt[: signatures[-1].start() if signatures else 0] + "\n" + code


def _fenced(text: str) -> list[str]:
    """Contents of the fenced blocks of a Markdown text, without the indentation of lists and quotes."""
    text = _FENCE_IN_LINE.sub(r"\1\n\2", text)
    for rules in (["code"], []):  # Without indented code, a fence may be indented by four spaces.
        tokens = MarkdownIt("zero").enable(["fence", "list", "blockquote", *rules]).parse(text)
        if found := [token for token in tokens if token.type == "fence"]:
            # Markdown does not end a block at a fence with a language; people and models do.
            return [re.split(rf"(?m)^{token.markup}[\w+#.-]+[ \t]*$", token.content)[0] for token in found]
    return []


def _row(row: Any, where: str) -> Row:
    """Parses a row; raises `UserError` if it is malformed."""
    try:
        parsed = Row(*(row[name] for name in Row._fields))
    except (KeyError, TypeError):
        raise UserError(f"{where}: not an object with {', '.join(Row._fields)}") from None
    if not all(isinstance(part, str) for part in parsed):
        raise UserError(f"{where}: all of {', '.join(Row._fields)} must be text")
    return parsed
