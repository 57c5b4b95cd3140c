"""Problems solved: all in flight together through the engine, judged by their task."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxchat.config import UserError
from jaxchat.decode.engine import Engine
from jaxchat.decode.requests import Completion, Request, Tool
from jaxchat.decode.sample import refused
from jaxchat.decode.sampling import SamplingParams
from jaxchat.decode.tools import named_tools
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
    log: Callable[[str], None] = print,
) -> Solved:
    """Asks every problem `n` times. As "text", a base model goes on after the question to the end of the line.

    Problem i is asked with seed + i, so its answers depend on no other problem. A problem that cannot be asked, and an
    answer that cannot be judged, count as wrong, and how many there are is said.

    Raises:
        UserError: n is less than 1, or the task calls a tool that there is not.
    """
    if n < 1:
        raise UserError(f"n={n} answers to a problem are too few: ask for 1 or more")
    tools = named_tools(task.tools)
    asked: list[Request | UserError] = []
    for i, problem in enumerate(problems):
        try:
            asked.append(_request(engine, problem, n, replace(sampling, seed=sampling.seed + i), style, tools))
        except UserError as error:
            asked.append(error)
    answered = iter(engine.generate([request for request in asked if isinstance(request, Request)]))
    records = []
    for number, (problem, request) in enumerate(zip(problems, asked)):
        answers = next(answered) if isinstance(request, Request) else [refused(request)]
        # A request that cannot be run has one answer, an error, for all its samples.
        answers = answers if len(answers) == n else answers * n
        if style == "text":
            answers = [replace(answer, text=answer.text.lstrip()) for answer in answers]
        records += [_judge(task, problem, answer, number, i) for i, answer in enumerate(answers)]
    if failed := [record for record in records if record.error]:
        log(f"warning: {len(failed)} of {len(records)} answers to {task.name} could not be judged: {failed[0].error}")
    return _summary(problems, records, n)


def _request(
    engine: Engine, problem: Problem, n: int, sampling: SamplingParams, style: Style, tools: Sequence[Tool]
) -> Request:
    if style == "chat":
        prompt = chat.render(problem.messages, engine.tokenizer, complete=True).ids
        return Request(prompt, sampling, n=n, tools=tools)
    # No space at the end: a token that begins a word holds the space before it.
    prompt = [engine.tokenizer.bos, *engine.tokenizer.encode(problem.question)]
    return Request(prompt, replace(sampling, stop=("\n",)), n=n)


def _judge(task: Task, problem: Problem, answer: Completion, number: int, sample: int) -> Record:
    error, score = answer.error, Score(False, False)
    if error is None:
        try:
            found = task.score(problem, answer.text)
            if not isinstance(found, tuple) or len(found) != 2 or not all(part in (False, True) for part in found):
                raise ValueError(f"it gave {found!r}, and no Score")
            score = Score(*map(bool, found))
        except Exception as failure:  # A task is the user's code; what it cannot judge is not right.
            error = f"the task {task.name} failed on {answer.text[:80]!r}: {failure}"
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
