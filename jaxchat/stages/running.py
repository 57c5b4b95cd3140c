"""Runs one stage in phases: resolve, check, prepare, build, train, report."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxchat import checkpoint, devices, metrics, processes, signals
from jaxchat.compilation import Compiled, Setup, compile_step, environment, make_setup
from jaxchat.data import cache, prepare
from jaxchat.data.cache import Log
from jaxchat.evaluation.curves import read_metrics
from jaxchat.experiment import STAGES, Experiment
from jaxchat.optim import learning_rate_factor
from jaxchat.stages import starts
from jaxchat.stages.checks import check, check_alike, check_end, check_finite, check_tokenizer
from jaxchat.stages.reporting import StepLog, describe, make_writers, write_samples
from jaxchat.stages.scores import TaskScores
from jaxchat.stages.stage import Stage, inherited, locate_start, not_used, record_start, started
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import Cadence, Hooks, State, fit, init_state


def run(experiment: Experiment) -> dict[str, Any]:
    """Runs one stage, resuming from its latest checkpoint if there is one; returns what the launcher prints.

    Raises:
        UserError: the stage cannot be run as configured.
        Interrupted: a signal came; a checkpoint was saved if the first step was taken.
    """
    terminal, began = metrics.Terminal(experiment.steps), time.monotonic()
    check_alike(experiment)
    e, tokenizer = inherited(experiment)
    if note := not_used(experiment, e):
        terminal.log(note)
    check(e)
    setup = make_setup(e, terminal.log)
    with run_lock(e.stage_directory, "trains", terminal.log):
        processes.check_shared(e.stage_directory, "--directory")
        setup, stage, tokenizer = prepared(setup, tokenizer, terminal.log)
        terminal.steps = stage.steps
        peak = devices.peak_flops(setup.mesh.devices.flat[0])  # Outside of the mesh, because a CPU's is measured.
        with jax.set_mesh(setup.mesh), contextlib.closing(stage):
            built = build(setup, stage, tokenizer, peak, terminal.log)
            with starts.recorded(e.stage_directory, began):
                results, step_log = train(built, terminal)
    check_end(built.setup.experiment, {"loss": step_log.loss} | results)
    return result(built, results, step_log)


def prepared(setup: Setup, tokenizer: Tokenizer | None, log: Log) -> tuple[Setup, Stage, Tokenizer]:
    """Makes the tokenizer and the rows, or takes them from the cache; sets `steps` if the rows determine it."""
    e = setup.experiment
    signals.check()
    if tokenizer is None:
        tokenizer = prepare.ensure_tokenizer(e.data, e.cache_directory, seed=e.seed, log=log)
    check_tokenizer(e.run_directory, tokenizer)
    signals.check()
    tasks = TaskScores(e, tokenizer, log)  # Reads the task files, before anything slow.
    stage: Stage = STAGES[e.stage].load()(e, tokenizer, tasks, log)
    if stage.steps != e.steps:
        setup = make_setup(dataclasses.replace(e, steps=stage.steps), lambda _: None)
    return setup, stage, tokenizer


class Built(NamedTuple):
    """Everything that the loop needs: the compiled step, and the state and metadata of the checkpoint at `start`."""

    setup: Setup
    stage: Stage
    tokenizer: Tokenizer
    compiled: Compiled
    peak: float | None
    checkpoints: checkpoint.Checkpoints
    snapshots: checkpoint.Checkpoints | None
    start: int
    state: State
    facts: dict[str, Any]


def build(setup: Setup, stage: Stage, tokenizer: Tokenizer, peak: float | None, log: Log) -> Built:
    """Compiles the step, restores or initializes the state, and writes experiment, tokenizer and data manifests."""
    e = setup.experiment
    signals.check()
    compiled = compile_step(setup, log)
    describe(setup, compiled, peak, log)
    processes.barrier()
    checkpoints = checkpoint.Checkpoints(e.stage_directory, keep=e.keep)
    snapshots = checkpoint.Checkpoints(e.stage_directory / checkpoint.SNAPSHOTS, keep=None) if e.keep_params else None
    start, state, facts = _start(setup, checkpoints, log)
    signals.check()
    stage.begin(setup, compiled.rows, start, facts)
    # The first files of the run; an experiment that was refused before this point does not occupy its name.
    if jax.process_index() == 0:
        if start == 0:
            starts.keep_records(e.stage_directory, log)
        tokenizer.save(e.run_directory / "tokenizer")
        checkpoint.write_experiment(e.stage_directory, e)
        if not start:
            record_start(e)
        stage.write_sources()
    return Built(setup, stage, tokenizer, compiled, peak, checkpoints, snapshots, start, state, facts)


def train(b: Built, terminal: metrics.Terminal) -> tuple[dict[str, Any], StepLog]:
    """Runs the loop with its checkpoints and evaluations; returns the latest scores and the log of the steps."""
    e, log = b.setup.experiment, terminal.log
    writers = make_writers(e, b.start, terminal)
    step_log = StepLog(b.setup, b.peak, writers, b.stage.numbers, log)
    if b.start and jax.process_index() == 0:
        step_log.replay(read_metrics(e.stage_directory))
    results: dict[str, Any] = dict(b.facts.get("results", {}))

    def save(number: int, state: State) -> None:
        facts = {"results": results, "environment": environment(b.setup)}
        if b.snapshots is not None:  # Orbax numbers its barriers in order, which must be the same in all processes.
            b.snapshots.wait()
        b.checkpoints.save(number, state, b.stage.facts(number) | facts)

    def score(number: int, state: State, last: bool) -> None:
        b.checkpoints.wait()
        # The checkpoint is saved, so an evaluation may be interrupted; several processes agree after it.
        with signals.deferred(jax.process_count() > 1):
            scores = b.stage.score(state, last=last or number == 0)  # The first and the last use the same rows.
        results.update(scores)
        if number == 0:
            numbers = {f"{name}_before": value for name, value in scores.items() if isinstance(value, int | float)}
            results.update(numbers)
        for writer in writers:
            writer.write({"step": number, **scores})

    def sample(number: int, state: State) -> None:
        write_samples(b.setup, b.tokenizer, state, number=number, log=log)

    def snapshot(number: int, state: State) -> None:
        if b.snapshots is not None:
            b.checkpoints.wait()
            b.snapshots.save(number, state, None)

    closing = [b.checkpoints.close] if b.snapshots is None else [b.checkpoints.close, b.snapshots.close]
    with signals.deferred(), contextlib.ExitStack() as stack:  # A signal waits for the next checkpoint.
        for close in (*(writer.close for writer in writers), *closing, step_log.finish):
            stack.callback(close)
        # A resumed run may have stopped between a checkpoint and its evaluation; a new stage scores its start.
        due = e.eval_every and b.start % e.eval_every == 0 and b.start < e.steps if b.start else e.start_from
        if due:
            score(b.start, b.state, False)
        agreed = processes.Agreement()

        def stop() -> bool:
            b.checkpoints.check()
            return agreed(bool(signals.received()))

        hooks = Hooks(step_log, save, score, sample, stop, snapshot)
        unit = 1 if e.rl is None else e.rl.updates
        every = unit * -(-e.steps // (unit * max(1, e.keep_params)))
        cadence = Cadence(e.save_every, e.eval_every, e.sample_every, unit, every)
        fit(b.state, b.compiled.step, b.stage.batch_at, start=b.start, steps=e.steps, cadence=cadence, hooks=hooks)
        b.checkpoints.wait()
        if b.start == e.steps:
            score(e.steps, b.state, True)
            sample(e.steps, b.state)
    return results, step_log


def result(b: Built, results: dict[str, Any], step_log: StepLog) -> dict[str, Any]:
    """Builds the result that the launcher prints."""
    e = b.setup.experiment
    return {
        "stage": e.stage,
        "step": e.steps,
        **b.stage.total(),
        "loss": step_log.loss,
        **results,
        "tokens_per_second": step_log.tokens_per_second,
        "mfu": step_log.mfu,
        "unstable_steps": step_log.stability.unstable_steps,
        "instabilities": step_log.stability.reports,
        "compile_seconds": round(b.compiled.seconds, 2),
        "micro_rows": b.compiled.rows,
        "attention": b.setup.transformer.attention,
        "peak_memory_bytes": devices.memory_bytes(),
        "checkpoint": str(e.stage_directory),
    }


def _start(setup: Setup, checkpoints: checkpoint.Checkpoints, log: Log) -> tuple[int, State, dict[str, Any]]:
    """Restores the latest checkpoint, or initializes a state with its shardings; returns step, state and metadata."""
    restored = checkpoints.restore(setup.abstract, log)
    if restored is not None:
        number, state, facts = restored
        place = checkpoints.directory / str(number)
        check_finite(state, f"the parameters of {place}", "remove it to resume from the one before")
        log(f"continuing from step {number:,}{_other_schedule(setup.experiment, number)}")
        return number, state, facts
    return 0, first_state(setup, log), {}


def _other_schedule(e: Experiment, number: int) -> str:
    """What another number of steps than at the last start does to the learning rates of step `number`; or ""."""
    if not (e.stage_directory / checkpoint.EXPERIMENT).is_file():
        return ""
    before = checkpoint.read_experiment(e.stage_directory, Experiment).steps
    if before == e.steps:
        return ""
    old, new = (float(learning_rate_factor(e.optimizer, steps)(jnp.int32(number))) for steps in (before, e.steps))
    rates = f": the factor of its learning rates is {new:.3g} instead of {old:.3g}" if old != new else ""
    return f" with {e.steps:,} steps instead of {before:,}{rates}"


def first_state(setup: Setup, log: Log) -> State:
    """The state before the first step: initialized, or with the parameters of the checkpoint that is started from."""
    e = setup.experiment
    placed = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    make = functools.partial(init_state, setup.transformer, setup.tx)
    state = jax.jit(make, out_shardings=placed)(jax.random.key(e.seed))
    if e.start_from:
        directory, step = locate_start(e)
        log(f"starting from {directory}@{step}")
        state = started(setup, state)
    check_finite(state, "the first parameters", "correct the fields of --model")
    return state


@contextlib.contextmanager
def run_lock(directory: Path, does: str, log: Log) -> Iterator[None]:
    """Locks a directory against a second process that `does` the same; `UserError` if it is already locked."""
    if jax.process_index():
        yield
        return
    refusal = f"another process {does} in {directory}: wait until it ends, or give this one its own --name"
    with cache.locked(directory, log, refusal=refusal, option="--directory"):
        yield
