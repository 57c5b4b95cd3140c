"""Speed of evaluation, all questions and problems together, beside one at a time in batches and engines of one row."""

from collections.abc import Callable
from typing import Any

from benchmarks import options, report, timing
from jaxchat import command_line, errors, launcher
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.sampling import SamplingParams
from jaxchat.evaluation.evaluate import Asked, Settings, Solving, parse_tasks
from jaxchat.evaluation.likelihoods import Scorer
from jaxchat.evaluation.questions import ask
from jaxchat.evaluation.solve import solve
from jaxchat.loading import load_checkpoint
from jaxchat.tasks import problems_of


def run(bench: options.Bench, arguments: list[str]) -> dict[str, Any]:
    """Both ways of every task: seconds, their ratio, and how many answers differ."""
    command_line.parse(options.Bench, arguments)  # Refuses unknown options.
    if not bench.checkpoint or not bench.tasks:
        raise errors.UserError("name a checkpoint and tasks: --checkpoint=runs/d4/pretrain --tasks core:DIRECTORY")
    loaded = load_checkpoint(bench.checkpoint)
    transformer, params, length = loaded.transformer(), loaded.params(), loaded.experiment.data.row_length
    style: Any = "text" if loaded.directory.name == "pretrain" else "chat"
    found = parse_tasks(bench.tasks, Settings(style), loaded.experiment.cache_directory / "downloads")
    questions = [q for job in found if isinstance(job, Asked) for q in job.questions(loaded.tokenizer, bench.limit)]
    rows, sampling = dict[str, Any](), SamplingParams(0.0, max_tokens=bench.max_tokens)

    def answers(job: Solving, slots: int) -> Callable[[], list[str]]:
        shape = EngineConfig(length, slots=slots, prefill_batch=min(8, slots))
        problems = problems_of(job.task, "test", bench.limit)
        engine = Engine(transformer, params, loaded.tokenizer, shape)
        solved = lambda part: solve(engine, job.task, part, sampling=sampling, style=style, log=launcher.log)  # noqa: E731
        parts = [problems] if slots > 1 else [[problem] for problem in problems]
        return lambda: [record.text for part in parts for own in solved(part).records for record in own]

    if questions:
        many, one = (Scorer(transformer, params, length=length, batch_tokens=size) for size in (None, 1))
        together = lambda: [answer.predicted for _, answer in sorted(ask(many, questions))]  # noqa: E731
        single = lambda: [answer.predicted for q in questions for _, answer in ask(one, [q])]  # noqa: E731
        rows["questions"] = compare(together, single)
    rows |= {job.name: compare(answers(job, bench.slots), answers(job, 1)) for job in found if isinstance(job, Solving)}
    return {**rows, "step": loaded.step, **report.surroundings(bench)}


def compare(together: Callable[[], list[Any]], single: Callable[[], list[Any]]) -> dict[str, Any]:
    """Seconds of both ways once everything is compiled, and how many of their answers differ."""
    together(), single()
    (answers, seconds), (others, single_seconds) = timing.timed(together), timing.timed(single)
    different = sum(one != other for one, other in zip(answers, others, strict=True))
    row = {"ratio": single_seconds / seconds, "count": len(answers), "different_answers": different}
    return row | {"seconds": seconds, "one_at_a_time_seconds": single_seconds}
