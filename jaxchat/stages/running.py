"""One stage from its configuration to its end: preparation, start or resumption, the loop, the last evaluation."""

import contextlib
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxchat import checkpoint, devices, metrics, processes, signals
from jaxchat.compilation import Setup, compile_step, make_setup
from jaxchat.data import cache, prepare
from jaxchat.decode.tools import named_tools
from jaxchat.errors import UserError
from jaxchat.evaluation.curves import read_metrics
from jaxchat.evaluation.evaluate import Settings, Solving, jobs
from jaxchat.experiment import RESUMABLE, STAGES, Experiment
from jaxchat.serialization import difference
from jaxchat.stages.reporting import StepLog, describe, make_writers, write_samples
from jaxchat.stages.stage import Stage, inherited, locate_start, started
from jaxchat.tasks import load_task
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import Cadence, Diverged, Hooks, State, all_finite, fit, init_state


def run(experiment: Experiment, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Runs one stage to its end, from wherever it stands; returns the launcher's result.

    Raises `Interrupted` where `stopped` tells of a signal before the first step, or one comes later.
    """
    terminal = metrics.Terminal(experiment.steps)
    check_alike(experiment)
    # What can be refused is refused before documents are prepared for hours, and before anything is written.
    e, tokenizer = inherited(experiment)
    checkpoint.check_same(e.stage_directory, e, RESUMABLE)
    check_ahead(e)
    check_tasks(e)
    setup = make_setup(e, terminal.log)
    cache.make_directory(e.stage_directory, "--directory")
    processes.check_shared(e.stage_directory, "--directory")
    with run_lock(e, terminal.log):
        raise_if_interrupted(stopped)
        if tokenizer is None:
            tokenizer = prepare.ensure_tokenizer(e.data, e.cache_directory, seed=e.seed, log=terminal.log)
        check_tokenizer(e.run_directory, tokenizer)
        raise_if_interrupted(stopped)
        stage = runner(e.stage)(e, tokenizer, terminal.log)
        if stage.steps != e.steps:
            setup = make_setup(dataclasses.replace(e, steps=stage.steps), lambda _: None)
            terminal.steps = stage.steps
        peak = devices.peak_flops(setup.mesh.devices.flat[0])
        with jax.set_mesh(setup.mesh), contextlib.closing(stage):
            return _train(setup, stage, tokenizer, peak, terminal, stopped)


def runner(stage: str) -> Callable[..., Stage]:
    """The class that runs a stage."""
    module, _, name = STAGES[stage].runner.partition(":")
    found: Callable[..., Stage] = getattr(importlib.import_module(module), name)
    return found


def _train(
    setup: Setup,
    stage: Stage,
    tokenizer: Tokenizer,
    peak: float | None,
    terminal: metrics.Terminal,
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    e, log = setup.experiment, terminal.log
    raise_if_interrupted(stopped)
    step, micro_rows, compile_seconds = compile_step(setup, log)
    describe(setup, micro_rows, compile_seconds, peak, log)
    processes.barrier()
    checkpoints = checkpoint.Checkpoints(e.stage_directory, keep=e.keep)
    with signals.noted() as interrupted:  # An error that a signal became must not be taken for damage.
        start, state, facts = _start(setup, checkpoints, log)
    raise_if_interrupted(lambda: stopped() or interrupted())
    stage.begin(setup, micro_rows, start, facts)
    # The first that is written of a run: until here another experiment may take its name.
    if jax.process_index() == 0:
        tokenizer.save(e.run_directory / "tokenizer")
        checkpoint.write_experiment(e.stage_directory, e)
        stage.write_sources()
    writers = make_writers(e, start, terminal)
    step_log = StepLog(setup, peak, writers, stage.numbers, log)
    if start and jax.process_index() == 0:
        step_log.replay(read_metrics(e.stage_directory))
    results: dict[str, Any] = dict(facts.get("results", {}))

    def save(number: int, state: State) -> None:
        checkpoints.save(number, state, stage.facts(number) | {"results": results})

    def score(number: int, state: State, last: bool) -> None:
        checkpoints.wait()
        found = stage.score(state, last=last or number == 0)  # The first and the last are of the same rows.
        results.update(found)
        if number == 0:
            results.update({f"{name}_before": value for name, value in found.items() if isinstance(value, int | float)})
        for writer in writers:
            writer.write({"step": number, **found})

    def sample(number: int, state: State) -> None:
        write_samples(setup, tokenizer, state, number=number, log=log)

    with signals.noted() as interrupted, contextlib.ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close)
        stack.callback(checkpoints.close)
        stack.callback(step_log.finish)
        # The run may have ended between a checkpoint and its evaluation; what a stage starts from is scored first.
        if (start and e.eval_every and start % e.eval_every == 0 and start < e.steps) or (not start and e.start_from):
            score(start, state, False)
        agreed = processes.Agreement()
        hooks = Hooks(step_log, save, score, sample, lambda: agreed(stopped() or interrupted()))
        cadence = Cadence(e.save_every, e.eval_every, e.sample_every, unit=1 if e.rl is None else e.rl.updates)
        state = fit(state, step, stage.batch_at, start=start, steps=e.steps, cadence=cadence, hooks=hooks)
        checkpoints.wait()
        if start == e.steps:
            score(e.steps, state, True)
    check_end(e, {"loss": step_log.loss} | results)
    return {
        "stage": e.stage,
        "step": e.steps,
        **stage.total(),
        "loss": step_log.loss,
        **results,
        "tokens_per_second": step_log.tokens_per_second,
        "mfu": step_log.mfu,
        "unstable_steps": step_log.stability.unstable_steps,
        "instabilities": step_log.stability.reports,
        "compile_seconds": round(compile_seconds, 2),
        "micro_rows": micro_rows,
        "attention": setup.transformer.attention,
        "peak_memory_bytes": devices.memory_bytes(),
        "checkpoint": str(e.stage_directory),
    }


def _start(
    setup: Setup, checkpoints: checkpoint.Checkpoints, log: Callable[[str], None]
) -> tuple[int, State, dict[str, Any]]:
    """The newest checkpoint, or a fresh state made in its place on every device."""
    e = setup.experiment
    restored = checkpoints.restore(setup.abstract, log)
    if restored is not None:
        number, state, facts = restored
        place = checkpoints.directory / str(number)
        check_finite(state, f"the parameters of {place}", "remove it to go on from the one before")
        log(f"continuing from step {number:,}")
        return number, state, facts
    placed = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    make = functools.partial(init_state, setup.transformer, setup.tx)
    state = jax.jit(make, out_shardings=placed)(jax.random.key(e.seed))
    if e.start_from:
        directory, step = locate_start(e)
        log(f"starting from {directory}@{step}")
        state = started(setup, state)
    check_finite(state, "the first parameters", "correct the numbers of --model")
    return 0, state, {}


def check_alike(e: Experiment) -> None:
    """Raises `UserError` where processes were given different experiments: they would wait for each other for ever."""
    others = processes.gather(e)
    changed = [difference(others[0], other) for other in others]
    for index, found in enumerate(changed):
        if named := [name for name in found if name not in ("directory", "data.cache", "data.workers")]:
            old, new = found[named[0]]
            raise UserError(
                f"{named[0]} is {old!r} in process 0 and {new!r} in process {index}: start all with the same command"
            )


def check_ahead(e: Experiment) -> None:
    """Raises `UserError` where the run has taken more steps already than it is asked for."""
    newest = max(checkpoint.finished_steps(e.stage_directory), default=0)
    if newest > e.steps > 0:
        raise UserError(f"{e.stage_directory} is at step {newest} already: ask for at least --steps={newest}")


def check_tasks(e: Experiment) -> None:
    """Raises `UserError` for a task or a tool that there is not, and for answers as long as a row."""
    downloads = e.cache_directory / "downloads"
    scored = [job.task for job in jobs(e.tasks, Settings("chat"), downloads) if isinstance(job, Solving)]
    for task in (*scored, *(load_task(spec, downloads) for spec in (e.rl.tasks if e.rl else ()))):
        named_tools(task.tools)
    if e.rl is not None and e.rl.max_tokens >= e.data.row_length:
        raise UserError(
            f"rl.max_tokens={e.rl.max_tokens} leaves no room for a question in a row of {e.data.row_length} tokens: "
            "lower it, or raise --data.row_length"
        )


@contextlib.contextmanager
def run_lock(e: Experiment, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the stage directory, so that no second process writes there; raises `UserError` where one does already."""
    if jax.process_index():
        yield
        return
    refusal = f"another process trains in {e.stage_directory}: wait for its end, or give this run its own --name"
    with cache.locked(e.stage_directory, log, refusal=refusal):
        yield


def raise_if_interrupted(stopped: Callable[[], bool]) -> None:
    """Raises `Interrupted` after a signal that a library swallowed."""
    if stopped():
        raise signals.Interrupted(signals.KEPT)


def check_tokenizer(run_directory: Path, tokenizer: Tokenizer) -> None:
    """Raises `UserError` where the run has checkpoints that were trained with another tokenizer."""
    place = run_directory / "tokenizer"
    trained = any(checkpoint.finished_steps(path) for path in run_directory.glob("*/"))
    if trained and place.exists() and Tokenizer.load(place).hash != tokenizer.hash:
        raise UserError(
            f"{place} is another tokenizer than this experiment's: its checkpoints would not fit; "
            "give the experiment its own --name"
        )


def check_finite(state: State, what: str, remedy: str) -> None:
    """Raises `UserError` where a parameter is not finite; no later step makes one so."""
    if not jax.jit(all_finite)(state.params):
        raise UserError(f"{what} are not finite: {remedy}")


def check_end(e: Experiment, results: dict[str, Any]) -> None:
    """Raises `Diverged` where a run ends with numbers that nobody can use; all its files are written by then."""
    bad = [
        f"{name}={value}" for name, value in results.items() if isinstance(value, float) and not math.isfinite(value)
    ]
    if bad:
        raise Diverged(
            f"the run ended at step {e.steps} with {' and '.join(bad)}: train with lower learning rates under another "
            f"--name; {e.stage_directory} holds its last finite parameters"
        )
