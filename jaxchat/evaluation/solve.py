"""Solves problems by generating all answers in one batch and scoring them with their task."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from jaxchat.decode.engine import Engine
from jaxchat.decode.requests import Completion, Request, Tool, check_finite
from jaxchat.decode.sample import refused
from jaxchat.decode.sampling import SamplingParams
from jaxchat.decode.tools import named_tools
from jaxchat.errors import UserError
from jaxchat.launcher import log
from jaxchat.processes import share_out
from jaxchat.tasks import Problem, Task
from jaxchat.tokenizer import chat

Style = Literal["chat", "text"]


class Record(NamedTuple):
    """An answer and its scores. One that could not be judged has an `error` and counts as wrong; so does one to a
    problem that could not be `asked`."""

    text: str
    strict: bool
    lenient: bool
    error: str | None = None
    asked: bool = True


class Solved(NamedTuple):
    """Results of a task.

    Attributes:
        pass_at: strict and lenient pass@k for k = 1, 2, 4, ... up to the number of answers per problem; pass@1 is the
            share of right answers.
        records: of every problem, one record per answer.
    """

    pass_at: Mapping[int, tuple[float, float]]
    records: Sequence[Sequence[Record]]


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k answers is right (arXiv:2107.03374, eq. 1)."""
    if right and answers - right < k:
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
    """Samples `n` answers to every problem and scores them.

    With style "text" a base model continues the question up to the end of the line, or to the task's `stop` texts.
    Problem i is sampled with seed + i, so its answers do not depend on other problems. Problems that cannot be rendered
    and answers that cannot be judged count as wrong; a warning gives their number.

    Raises:
        UserError: n is less than 1, there is no problem, or the task uses an unknown tool.
    """
    if not problems:
        raise UserError(f"the task {task.name} has no problems to solve: nothing can be scored")
    if n < 1:
        raise UserError(f"n={n} answers per problem are too few: sample 1 or more")
    if notice := getattr(task, "notice", ""):
        log(notice)

    def answer(part: Sequence[tuple[int, Problem]]) -> list[list[Record]]:
        return _answer(engine, task, part, n, sampling, style)

    records = share_out(list(enumerate(problems)), answer)
    warn_of_errors(task, [record for own in records for record in own], log)

    def mean(how: Callable[[Record], bool], k: int) -> float:
        return sum(pass_at_k(n, sum(map(how, own)), k) for own in records) / len(records)

    ks = [1 << i for i in range(n.bit_length())]
    pass_at = {k: (mean(lambda record: record.strict, k), mean(lambda record: record.lenient, k)) for k in ks}
    return Solved(pass_at, records)


def warn_of_errors(task: Task, records: Sequence[Record], log: Callable[[str], None]) -> None:
    """Logs the number of answers that could not be judged, and the first error."""
    if failed := [record for record in records if record.error]:
        log(f"warning: {len(failed)} of {len(records)} answers to {task.name} could not be judged: {failed[0].error}")


def _answer(
    engine: Engine,
    task: Task,
    problems: Sequence[tuple[int, Problem]],
    n: int,
    sampling: SamplingParams,
    style: Style,
) -> list[list[Record]]:
    """Answers numbered problems; returns `n` records for each."""
    tools = named_tools(task.tools)
    requests: list[Request | UserError] = []
    for number, problem in problems:
        try:
            seeded = replace(sampling, seed=sampling.seed + number)
            requests.append(_request(engine, task, problem, n, seeded, style, tools))
        except UserError as error:
            requests.append(UserError(f"problem {number} cannot be asked: {error}"))
    generated = iter(engine.generate([request for request in requests if isinstance(request, Request)]))
    completions: list[list[Completion]] = []
    for request in requests:
        answers = next(generated) if isinstance(request, Request) else [refused(request)]
        # A request that cannot be run has a single completion, an error, instead of n.
        check_finite(answers)
        answers = answers if len(answers) == n else answers * n
        if style == "text" and not hasattr(task, "stop"):
            answers = [replace(answer, text=answer.text.lstrip()) for answer in answers]
        completions.append(answers)
    pairs = [(problem, answer) for (_, problem), own in zip(problems, completions) for answer in own]
    judged = iter(judge(task, [(problem, answer.text) for problem, answer in pairs if answer.error is None]))
    return [
        [
            next(judged) if answer.error is None else Record(answer.text, False, False, answer.error, False)
            for answer in own
        ]
        for own in completions
    ]


def _request(
    engine: Engine, task: Task, problem: Problem, n: int, sampling: SamplingParams, style: Style, tools: Sequence[Tool]
) -> Request:
    if style == "chat":
        prompt = chat.render(problem.messages, engine.tokenizer, complete=True).ids
        return Request(prompt, sampling, n=n, tools=tools)
    # The prompt has no trailing space, because the first token of a word includes the space before it.
    prompt = [engine.tokenizer.bos, *engine.tokenizer.encode(problem.question)]
    return Request(prompt, replace(sampling, stop=tuple(getattr(task, "stop", ("\n",)))), n=n)


def judge(task: Task, answers: Sequence[tuple[Problem, str]]) -> list[Record]:
    """Records of the texts of answers; anything that the task returns but a Score is an error."""
    records = []
    for (_, text), score in zip(answers, scores_of(task, answers)):
        if isinstance(score, tuple) and len(score) == 2 and all(part in (False, True) for part in score):
            records.append(Record(text, bool(score[0]), bool(score[1])))
        else:
            reason = score if isinstance(score, Exception) else f"it returned {score!r} instead of a Score"
            error = f"the task {task.name} failed on {text[:80]!r}: {reason}"
            records.append(Record(text, False, False, error))
    return records


def scores_of(task: Task, answers: Sequence[tuple[Problem, str]]) -> list[Any]:
    """What the task returns for each answer, or the exception it raises. Tasks are user code, so any may occur."""
    if hasattr(task, "score_many"):
        try:
            scores = list(task.score_many(answers))
        except Exception as failure:
            return [failure] * len(answers)
        mismatch = ValueError(f"it scored {len(scores)} of {len(answers)} answers")
        return scores if len(scores) == len(answers) else [mismatch] * len(answers)
    scores = []
    for problem, text in answers:
        try:
            scores.append(task.score(problem, text))
        except Exception as failure:
            scores.append(failure)
    return scores
