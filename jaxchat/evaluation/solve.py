"""Problems solved: all in flight together through the engine, judged by their task."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxchat.decode.engine import Engine
from jaxchat.decode.requests import Completion, Request, Tool
from jaxchat.decode.sample import refused
from jaxchat.decode.sampling import SamplingParams
from jaxchat.decode.tools import named_tools
from jaxchat.errors import UserError
from jaxchat.launcher import log
from jaxchat.processes import share_out
from jaxchat.tasks import Problem, Score, Task
from jaxchat.tokenizer import chat

Style = Literal["chat", "text"]


@dataclass(frozen=True)
class Record:
    """One answer and what its task says of it; an answer that could not be judged has an error, and counts as wrong."""

    problem: int
    sample: int
    text: str
    strict: bool
    lenient: bool
    tokens: int
    finish_reason: str
    error: str | None = None


@dataclass(frozen=True)
class Solved:
    """Shares of right answers, strictly and leniently judged.

    Attributes:
        pass_at: for k = 1, 2, 4, ... up to the number of answers, how probable it is that one of k is right.
        by_kind: strict share of each kind of problem.
    """

    strict: float
    lenient: float
    pass_at: Mapping[int, tuple[float, float]]
    by_kind: Mapping[str, float]
    mean_tokens: float
    finish_reasons: Mapping[str, int]
    errors: int
    records: tuple[Record, ...]


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The unbiased estimate of the probability that one of k answers is right (arXiv:2107.03374, eq. 1)."""
    if answers - right < k:
        return 1.0
    return 1.0 - math.prod(1 - k / i for i in range(answers - right + 1, answers + 1))


def solve(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    *,
    n: int = 1,
    sampling: SamplingParams,
    style: Style = "chat",
    log: Callable[[str], None] = log,
) -> Solved:
    """Asks every problem `n` times. As "text", a base model goes on after the question to the end of the line, or to
    the task's own `stop`.

    Problem i is asked with seed + i, so its answers depend on no other problem. A problem that cannot be asked, and an
    answer that cannot be judged, count as wrong, and how many there are is said.

    Raises:
        UserError: n is less than 1, or the task calls a tool that there is not.
    """
    if n < 1:
        raise UserError(f"n={n} answers to a problem are too few: ask for 1 or more")
    if notice := getattr(task, "notice", ""):
        log(notice)

    def judged(part: Sequence[tuple[int, Problem]]) -> list[list[Record]]:
        return _judged(engine, task, part, n, sampling, style)

    records = [record for own in share_out(list(enumerate(problems)), judged) for record in own]
    if failed := [record for record in records if record.error]:
        log(f"warning: {len(failed)} of {len(records)} answers to {task.name} could not be judged: {failed[0].error}")
    return _summary(problems, records, n)


def _judged(
    engine: Engine,
    task: Task,
    problems: Sequence[tuple[int, Problem]],
    n: int,
    sampling: SamplingParams,
    style: Style,
) -> list[list[Record]]:
    """The records of some problems, by their numbers."""
    tools = named_tools(task.tools)
    asked: list[Request | UserError] = []
    for number, problem in problems:
        try:
            seeded = replace(sampling, seed=sampling.seed + number)
            asked.append(_request(engine, task, problem, n, seeded, style, tools))
        except UserError as error:
            asked.append(error)
    answered = iter(engine.generate([request for request in asked if isinstance(request, Request)]))
    given: list[list[Completion]] = []
    for request in asked:
        answers = next(answered) if isinstance(request, Request) else [refused(request)]
        # A request that cannot be run has one answer, an error, for all its samples.
        answers = answers if len(answers) == n else answers * n
        if style == "text" and not hasattr(task, "stop"):
            answers = [replace(answer, text=answer.text.lstrip()) for answer in answers]
        given.append(answers)
    texts = [
        (problem, answer.text) for (_, problem), own in zip(problems, given) for answer in own if answer.error is None
    ]
    said = iter(_said(task, texts))
    return [
        [_judge(task, None if answer.error else next(said), answer, number, i) for i, answer in enumerate(own)]
        for (number, _), own in zip(problems, given)
    ]


def _request(
    engine: Engine, task: Task, problem: Problem, n: int, sampling: SamplingParams, style: Style, tools: Sequence[Tool]
) -> Request:
    if style == "chat":
        prompt = chat.render(problem.messages, engine.tokenizer, complete=True).ids
        return Request(prompt, sampling, n=n, tools=tools)
    # No space at the end: a token that begins a word holds the space before it.
    prompt = [engine.tokenizer.bos, *engine.tokenizer.encode(problem.question)]
    return Request(prompt, replace(sampling, stop=tuple(getattr(task, "stop", ("\n",)))), n=n)


def _said(task: Task, answers: Sequence[tuple[Problem, str]]) -> list[Any]:
    """What a task says of each answer, or the error that it raised: a task is the user's code."""
    if hasattr(task, "score_many"):
        try:
            found = list(task.score_many(answers))
        except Exception as failure:
            return [failure] * len(answers)
        short = ValueError(f"it scored {len(found)} of {len(answers)} answers")
        return found if len(found) == len(answers) else [short] * len(answers)
    found = []
    for problem, text in answers:
        try:
            found.append(task.score(problem, text))
        except Exception as failure:
            found.append(failure)
    return found


def _judge(task: Task, said: Any, answer: Completion, number: int, sample: int) -> Record:
    """The record of an answer; one that could not be judged is not right."""
    error, score = answer.error, Score(False, False)
    if error is None:
        if isinstance(said, tuple) and len(said) == 2 and all(part in (False, True) for part in said):
            score = Score(*map(bool, said))
        else:
            what = said if isinstance(said, Exception) else f"it gave {said!r}, and no Score"
            error = f"the task {task.name} failed on {answer.text[:80]!r}: {what}"
    return Record(number, sample, answer.text, *score, len(answer.tokens), answer.finish_reason, error)


def _summary(problems: Sequence[Problem], records: Sequence[Record], n: int) -> Solved:
    strict, lenient = ([0] * len(problems) for _ in range(2))
    kinds: dict[str, list[bool]] = {}
    for record in records:
        strict[record.problem] += record.strict
        lenient[record.problem] += record.lenient
        kinds.setdefault(problems[record.problem].kind, []).append(record.strict)
    count = max(len(problems), 1)
    ks = [1 << i for i in range(n.bit_length()) if 1 << i <= n]
    pass_at = {
        k: tuple(sum(pass_at_k(n, right, k) for right in found) / count for found in (strict, lenient)) for k in ks
    }
    return Solved(
        strict=sum(strict) / (count * n),
        lenient=sum(lenient) / (count * n),
        pass_at=pass_at,  # type: ignore[arg-type]
        by_kind={kind: sum(found) / len(found) for kind, found in kinds.items()},
        mean_tokens=sum(record.tokens for record in records) / max(len(records), 1),
        finish_reasons=Counter(record.finish_reason for record in records),
        errors=sum(record.error is not None for record in records),
        records=tuple(records),
    )
