"""Speed of evaluation: all questions and problems in flight together, beside one at a time, with equal answers.

The same weights and compiled programs of the same kind on both sides, every shape compiled before it is timed. One at a
time, a question's choices are whole rows of one batch, padded to the next of a few lengths, and a problem is answered
by an engine with one slot.
"""

import functools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import numpy as np

from jaxchat import devices
from jaxchat.benchmarks.engines import random_weights
from jaxchat.benchmarks.train import machine, versions
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.evaluation.evaluate import Asked, Settings, Solving, jobs
from jaxchat.evaluation.likelihoods import Scored, Scorer, answer_size, row_size, score_rows
from jaxchat.evaluation.questions import Answer, Question, answer, ask, fit
from jaxchat.evaluation.solve import solve
from jaxchat.launcher import log
from jaxchat.loading import Loaded, load_checkpoint
from jaxchat.model.transformer import Params, Transformer
from jaxchat.sharding import Mesh, decoding_mesh
from jaxchat.tasks import problems_of

CLOSE = 1e-4  # Nats between the two best choices that rounding may turn around.


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        checkpoint: whose model and tokenizer, such as runs/d4/pretrain.
        tasks: as those of launch.evaluate; bits per byte are not measured here.
        limit: questions of each task.
        problems: problems of each task that is answered.
        max_tokens: longest answer to one.
        weights: those of the checkpoint, or random ones of its shape.
        batch_tokens: tokens of a batch of questions; 0 is the platform's own.
        shuffle: the order in which questions are asked together; one at a time they are asked in theirs.
        slots: answers decoded at once.
        mesh: how devices share the questions that are asked together.
        threads: on a CPU, how many cores may be used.
        timed: without it everything is asked once, and only the answers are compared.
    """

    checkpoint: str = ""
    tasks: tuple[str, ...] = ()
    limit: int = 50
    problems: int = 256
    max_tokens: int = 64
    weights: Literal["checkpoint", "random"] = "checkpoint"
    batch_tokens: int = 0
    shuffle: int = 0
    slots: int = 64
    mesh: Mesh = Mesh()
    threads: int = 2
    timed: bool = True

    def __post_init__(self) -> None:
        for name in ("limit", "problems", "max_tokens", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def run(bench: Bench, experiment_class: type) -> dict[str, Any]:
    """Both ways of every task: seconds, their ratio, and how many answers differ."""
    if not bench.checkpoint or not bench.tasks:
        raise UserError("name a checkpoint and tasks: --checkpoint=runs/d4/pretrain --tasks core:DIRECTORY")
    mesh = decoding_mesh(bench.mesh)
    loaded = load_checkpoint(bench.checkpoint, experiment_class)
    style: Literal["chat", "text"] = "text" if loaded.directory.name == "pretrain" else "chat"
    found = jobs(bench.tasks, Settings(style), loaded.experiment.cache_directory / "downloads")
    asked = [job for job in found if isinstance(job, Asked)]
    solved = [job for job in found if isinstance(job, Solving)]
    results: dict[str, Any] = {}
    if asked:
        questions = [q for job in asked for q in job.questions(loaded.tokenizer, bench.limit)]
        results["questions"] = _questions(loaded, questions, bench, mesh)
    for job in solved:
        results[job.name] = _problems(loaded, job, bench, style, mesh)
    e = loaded.experiment
    return {
        **results,
        "settings": asdict(bench),
        "step": loaded.step,
        "model": {"depth": e.depth, "width": e.model.width, "vocab": e.model.vocab, "context": e.data.row_length},
        "peak_memory_bytes": devices.memory_bytes(),
        "versions": versions(("jax", "jaxlib", "flax")),
        "machine": machine(bench.threads),
    }


def _questions(
    loaded: Loaded, questions: Sequence[Question], bench: Bench, mesh: jax.sharding.Mesh | None
) -> dict[str, Any]:
    """Likelihoods: shared contexts and full batches, beside a loop over questions."""
    transformer, length = loaded.transformer(), loaded.experiment.data.row_length
    weights = _weights(loaded, bench, mesh)
    batched = Scorer(transformer, weights, mesh=mesh, length=length, batch_tokens=bench.batch_tokens or None)
    single = functools.partial(one_at_a_time, transformer, _weights(loaded, bench, None), questions, length)
    order = list(range(len(questions)))
    if bench.shuffle:
        random.Random(bench.shuffle).shuffle(order)
    mixed = [questions[i] for i in order]
    log(f"{len(questions):,} questions, {sum(len(question.items) for question in questions):,} items")
    together, seconds = _timed("together", bench, lambda: dict(ask(batched, mixed)))
    alone, loop_seconds = _timed("one at a time", bench, lambda: list(single()))
    pairs = [(together[place], alone[number]) for place, number in enumerate(order)]
    different = [(mine, other) for mine, other in pairs if mine.predicted != other.predicted]
    gaps = [abs(a - b) for mine, other in pairs for a, b in zip(mine.scores, other.scores)]
    return {
        "ratio": round(loop_seconds / seconds, 3) if bench.timed else None,
        "questions": len(questions),
        "seconds": round(seconds, 3),
        "one_at_a_time_seconds": round(loop_seconds, 3),
        "different_answers": len(different),
        "of_them_close": sum(_close(other) for _, other in different),
        "largest_score_gap": float(max(gaps)),
    }


def one_at_a_time(
    transformer: Transformer, params: Params, questions: Sequence[Question], length: int
) -> Iterator[Answer]:
    """Every question by itself: its items are whole rows of one batch, nothing is shared."""
    unstacked = jax.jit(transformer.unstack)(params)
    for question in questions:
        fitted, truncated = fit(question, length)
        T = row_size(max(len(item.context) + len(item.continuation) - 1 for item in fitted.items), length)
        N = answer_size(max(len(item.continuation) for item in fitted.items))
        tokens_BT, at_BN, targets_BN = (np.zeros((len(fitted.items), size), np.int32) for size in (T, N, N))
        for b, (context, continuation) in enumerate(fitted.items):
            row, count = [*context, *continuation][:-1], len(continuation)
            tokens_BT[b, : len(row)] = row
            at_BN[b, :count] = range(len(context) - 1, len(row))
            targets_BN[b, :count] = continuation
        logprobs_BN, greedy_BN = jax.device_get(_ROWS(transformer, unstacked, tokens_BT, at_BN, targets_BN))
        counts = [len(item.continuation) for item in fitted.items]
        scored = [Scored(logprobs_BN[b, :n], bool(greedy_BN[b, :n].all()), 0) for b, n in enumerate(counts)]
        yield answer(fitted, scored, truncated)


_ROWS = jax.jit(score_rows, static_argnums=0)


def _close(answered: Answer) -> bool:
    """Whether rounding may choose between the two best; of a single continuation that is not known, so it may not."""
    first, *others = sorted(answered.scores, reverse=True)
    return bool(others) and first - others[0] < CLOSE


def _problems(
    loaded: Loaded, job: Solving, bench: Bench, style: Literal["chat", "text"], mesh: jax.sharding.Mesh | None
) -> dict[str, Any]:
    """Answers: all problems in flight together, beside one at a time."""
    problems = list(problems_of(job.task, "test"))[: bench.problems]
    sampling = SamplingParams(0.0, max_tokens=bench.max_tokens)
    length = loaded.experiment.data.row_length

    def answers(slots: int, mesh: jax.sharding.Mesh | None) -> Callable[[], list[Any]]:
        shape = EngineConfig(length, slots=slots, prefill_batch=min(8, slots))
        engine = Engine(loaded.transformer(), _weights(loaded, bench, mesh), loaded.tokenizer, shape, mesh=mesh)

        def all_of_them() -> list[Any]:
            some = [problems] if slots > 1 else [[problem] for problem in problems]
            made = [solve(engine, job.task, part, sampling=sampling, style=style, log=log).records for part in some]
            return [record for records in made for record in records]

        return all_of_them

    together, seconds = _timed(f"{job.name}: together", bench, answers(bench.slots, mesh))
    alone, loop_seconds = _timed(f"{job.name}: one at a time", bench, answers(1, None))
    return {
        "ratio": round(loop_seconds / seconds, 3) if bench.timed else None,
        "problems": len(problems),
        "seconds": round(seconds, 3),
        "one_at_a_time_seconds": round(loop_seconds, 3),
        "answer_tokens": round(float(np.mean([record.tokens for record in together])), 1),
        "different_texts": sum(mine.text != other.text for mine, other in zip(together, alone)),
        "different_verdicts": sum(mine.strict != other.strict for mine, other in zip(together, alone)),
    }


def _weights(loaded: Loaded, bench: Bench, mesh: jax.sharding.Mesh | None) -> Any:
    return random_weights(loaded.transformer(), 0) if bench.weights == "random" else loaded.params(mesh)


def _timed(name: str, bench: Bench, work: Callable[[], Any]) -> tuple[Any, float]:
    """What comes of it, and the seconds it takes, when everything is compiled if it is `timed`."""
    if bench.timed:
        work()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    log(f"{name}: {seconds:.2f} s")
    return result, seconds
