"""Stages: which rows, which objective, which evaluations; everything between a configuration and the loop."""

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxchat import checkpoint, metrics, optim, sharding, signals
from jaxchat.compilation import Setup, compile_step, make_setup
from jaxchat.config import UserError, to_json
from jaxchat.data import cache, prepare, streams
from jaxchat.evaluation.bits_per_byte import BitsPerByte
from jaxchat.experiment import RESUMABLE, Experiment
from jaxchat.model.transformer import flops_per_token, parameter_counts
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import Cadence, Hooks, State, all_finite, fit, init_state


def run(experiment: Experiment, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Runs one stage to its end, from wherever it stands; returns the launcher's result.

    Raises `Interrupted` where `stopped` tells of a signal before the first step, or one comes later.
    """
    terminal = metrics.Terminal(experiment.steps)
    # What can be refused is refused before documents are prepared for hours, and before anything is written.
    checkpoint.check_same(experiment.stage_directory, experiment, RESUMABLE)
    check_ahead(experiment)
    setup = make_setup(experiment, terminal.say)
    cache.make_directory(experiment.stage_directory, "--directory")
    with alone(experiment, terminal.say):
        go_on(stopped)
        tokenizer = prepare.ensure_tokenizer(
            experiment.data, experiment.cache_directory, seed=experiment.seed, log=terminal.say
        )
        check_tokenizer(experiment.run_directory, tokenizer)
        go_on(stopped)
        rows = {
            split: prepare.ensure_rows(experiment.data, tokenizer, split, experiment.cache_directory, log=terminal.say)
            for split in ("train", "val")
        }
        peak = metrics.peak_flops(setup.mesh.devices.flat[0])
        with jax.set_mesh(setup.mesh):
            return _train(setup, tokenizer, rows, peak, terminal, stopped)


def _train(
    setup: Setup,
    tokenizer: Tokenizer,
    rows: dict[str, Any],
    peak: float | None,
    terminal: metrics.Terminal,
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    e = setup.experiment
    go_on(stopped)
    step, micro_rows, compile_seconds = compile_step(setup, terminal.say)
    describe(setup, micro_rows, compile_seconds, peak, terminal.say)
    checkpoints = checkpoint.Checkpoints(e.stage_directory, keep=e.keep)
    made_of = [part.directory.name for part in rows["train"]]  # Each a hash of everything that decides its rows.
    with signals.noted() as interrupted:  # An error that a signal became must not be taken for damage.
        start, state, facts = _start(setup, checkpoints, terminal.say)
    go_on(lambda: stopped() or interrupted())
    if facts.get("rows", made_of) != made_of:
        raise UserError(
            f"the documents of --data.train are not those that {e.stage_directory} was trained on: "
            "put those back, or give this run its own --name"
        )
    # The first that is written of a run: until here another experiment may take its name.
    tokenizer.save(e.run_directory / "tokenizer")
    checkpoint.write_experiment(e.stage_directory, e)
    write_manifests(e, rows)
    writers = make_writers(e, start, terminal)
    evaluate = BitsPerByte(
        setup.transformer,
        setup.mesh,
        rows=rows["val"],
        bytes_per_token=tokenizer.bytes_per_token,
        batch_rows=micro_rows,
    )
    log = StepLog(setup, peak, writers)
    results: dict[str, Any] = {"val_bpb": facts.get("val_bpb")}
    held_out = sum(map(len, rows["val"]))

    def save(number: int, state: State) -> None:
        checkpoints.save(
            number, state, {"val_bpb": results["val_bpb"], "tokens": number * e.batch_tokens, "rows": made_of}
        )

    def score(number: int, state: State, last: bool) -> None:
        checkpoints.wait()
        wanted = held_out if last or not e.eval_rows else min(e.eval_rows, held_out)
        # Never more tokens than the run trains on, so that a trial of a large model ends soon.
        results["val_rows"] = min(wanted, e.steps * e.batch_rows)
        results["val_bpb"] = evaluate(state.params, results["val_rows"])
        for writer in writers:
            writer.write({"step": number, "val_bpb": results["val_bpb"], "val_rows": results["val_rows"]})

    def sample(number: int, state: State) -> None:
        write_samples(setup, tokenizer, state, number=number, say=terminal.say)

    stream = streams.RowStream(
        rows["train"],
        e.data.weights,
        seed=e.seed,
        batch_rows=e.batch_rows,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    with signals.noted() as interrupted, contextlib.ExitStack() as stack:
        for writer in writers:
            stack.callback(writer.close)
        stack.callback(checkpoints.close)
        if start and e.eval_every and start % e.eval_every == 0 and start < e.steps:
            score(start, state, False)  # The run may have ended between this checkpoint and its evaluation.
        batches = device_batches(setup, stream, start, micro_rows)
        hooks = Hooks(log, save, score, sample, lambda: stopped() or interrupted())
        cadence = Cadence(e.save_every, e.eval_every, e.sample_every)
        take = lambda _index, _state: next(batches)[1]  # noqa: E731
        state = fit(state, step, take, start=start, steps=e.steps, cadence=cadence, hooks=hooks)
        checkpoints.wait()
        if results["val_bpb"] is None or start == e.steps:
            score(e.steps, state, True)
    check_end(e, log.loss, results["val_bpb"])
    return {
        "stage": e.stage,
        "step": e.steps,
        "tokens": e.steps * e.batch_tokens,
        "loss": log.loss,
        "val_bpb": results["val_bpb"],
        "val_rows": results["val_rows"],
        "val_rows_in_all": held_out,
        "tokens_per_second": log.tokens_per_second,
        "mfu": log.mfu,
        "compile_seconds": round(compile_seconds, 2),
        "micro_rows": micro_rows,
        "peak_memory_bytes": metrics.memory_bytes(),
        "checkpoint": str(e.stage_directory),
    }


def _start(
    setup: Setup, checkpoints: checkpoint.Checkpoints, say: Callable[[str], None]
) -> tuple[int, State, dict[str, Any]]:
    """The newest checkpoint, or a fresh state made in its place on every device."""
    e = setup.experiment
    restored = checkpoints.restore(setup.abstract, say)
    if restored is not None:
        number, state, facts = restored
        place = checkpoints.directory / str(number)
        check_finite(state, f"the parameters of {place}", "remove it to go on from the one before")
        say(f"continuing from step {number:,}")
        return number, state, facts
    placed = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    make = functools.partial(init_state, setup.transformer, setup.tx)
    state = jax.jit(make, out_shardings=placed)(jax.random.key(e.seed))
    check_finite(state, "the first parameters", "correct the numbers of --model")
    return 0, state, {}


def device_batches(
    setup: Setup, stream: streams.RowStream, start: int, micro_rows: int
) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """Batches on the devices as (micro-batches, rows, ...), read ahead in a thread."""
    e = setup.experiment
    micro = e.batch_rows // micro_rows
    for index, batch in stream.prefetch(start, e.steps):
        cut = {name: column.reshape(micro, -1, *column.shape[1:]) for name, column in batch.items()}
        yield index, sharding.put_batch(setup.mesh, cut)


class StepLog:
    """Turns a step's metrics into a record with speed and utilisation, and remembers the median speed."""

    def __init__(self, setup: Setup, peak: float | None, writers: list[metrics.Writer]) -> None:
        e = setup.experiment
        self._experiment, self._writers = e, writers
        self._rate = optim.learning_rate_factor(e.optimizer, e.steps)
        self._flops = flops_per_token(e.model, e.data.row_length)["total"]
        self._peak = None if peak is None else peak * setup.mesh.size
        self._seconds: list[float] = []
        self.loss: float | None = None

    def __call__(self, number: int, values: dict[str, float], seconds: float) -> None:
        speed = self._experiment.batch_tokens / seconds
        taken = number - 1 - values["skipped"] + (values["skipped_in_row"] > 0)  # The optimizer counts no other steps.
        record = {
            "step": number,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate_factor": float(self._rate(np.float64(taken))),
            "tokens": number * self._experiment.batch_tokens,
            "seconds": seconds,
            "tokens_per_second": speed,
            "mfu": None if self._peak is None else speed * self._flops / self._peak,
            "skipped": values["skipped"],
            "memory_bytes": metrics.memory_bytes(),
        }
        self.loss = values["loss"]
        self._seconds.append(seconds)
        for writer in self._writers:
            writer.write(record)

    @property
    def tokens_per_second(self) -> float | None:
        """By the median step after the first."""
        if not self._seconds:
            return None
        return round(self._experiment.batch_tokens / float(np.median(self._seconds[1:] or self._seconds)), 1)

    @property
    def mfu(self) -> float | None:
        speed = self.tokens_per_second
        return None if speed is None or self._peak is None else round(speed * self._flops / self._peak, 4)


def write_samples(setup: Setup, tokenizer: Tokenizer, state: State, *, number: int, say: Callable[[str], None]) -> None:
    """Continues each prompt greedily and adds the texts to samples.md; a prompt that is too long is left out.

    What samples.md holds of this step and of later ones, from before a kill, is replaced.
    """
    from jaxchat.decode.engine import Engine, Shape
    from jaxchat.decode.requests import Request
    from jaxchat.decode.sampling import SamplingParams

    e = setup.experiment
    if jax.process_count() > 1 or not e.prompts:
        return
    shape = Shape(length=min(128, e.data.row_length), slots=len(e.prompts), steps=16, adapt=False)
    engine, greedy = Engine(setup.transformer, state.params, tokenizer, shape), SamplingParams(0.0, max_tokens=64)
    asked = [Request([tokenizer.bos, *tokenizer.encode(prompt)], greedy) for prompt in e.prompts]
    lines = [f"\n## Step {number}\n"]
    for prompt, (answer,) in zip(e.prompts, engine.generate(asked)):
        if answer.error:  # A run of hours does not fail for a sample.
            say(f"warning: no sample for {prompt!r}: {answer.error}")
            continue
        lines.append(f"- **{prompt}**{answer.text}\n")
        say(f"  | {prompt}{answer.text}")
    path = e.stage_directory / "samples.md"
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    kept = [part for part in re.split(r"^(?=\n## Step \d+$)", before, flags=re.M) if _sampled_step(part) < number]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept + lines), encoding="utf-8")
    temporary.replace(path)


def _sampled_step(part: str) -> int:
    heading = re.match(r"\n## Step (\d+)$", part, flags=re.M)
    return int(heading[1]) if heading else -1


def check_ahead(e: Experiment) -> None:
    """Raises `UserError` where the run has taken more steps already than it is asked for."""
    newest = max(checkpoint.finished_steps(e.stage_directory), default=0)
    if newest > e.steps:
        raise UserError(f"{e.stage_directory} is at step {newest} already: ask for at least --steps={newest}")


@contextlib.contextmanager
def alone(e: Experiment, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the stage directory, so that no second process writes there; raises `UserError` where one does already."""
    if jax.process_index() or "://" in e.directory:
        yield
        return
    refusal = f"another process trains in {e.stage_directory}: wait for its end, or give this run its own --name"
    with cache.locked(e.stage_directory, say, refusal=refusal):
        yield


def go_on(stopped: Callable[[], bool]) -> None:
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


def check_end(e: Experiment, loss: float | None, val_bpb: float) -> None:
    """Raises `UserError` where a run ends with numbers that nobody can use; all its files are written by then."""
    found = {name: value for name, value in (("loss", loss), ("val_bpb", val_bpb)) if value is not None}
    bad = [f"{name}={value}" for name, value in found.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"the run ended at step {e.steps} with {' and '.join(bad)}: train with lower learning rates under another "
            f"--name; {e.stage_directory} holds its last finite parameters"
        )


def write_manifests(experiment: Experiment, rows: dict[str, Any]) -> None:
    """What the run trained on and was scored on, beside its checkpoints."""
    place = experiment.run_directory / "rows"
    place.mkdir(parents=True, exist_ok=True)
    for split, parts in rows.items():
        manifests = [part.manifest for part in (parts if isinstance(parts, list) else [parts])]
        (place / f"{split}.json").write_text(json.dumps(manifests, indent=1) + "\n", encoding="utf-8")


def make_writers(e: Experiment, start: int, terminal: metrics.Terminal) -> list[metrics.Writer]:
    """Writers of the first process; others write nothing."""
    if jax.process_index():
        return []
    writers: list[metrics.Writer] = [terminal, metrics.JsonLines(e.stage_directory / "metrics.jsonl", start)]
    try:
        if e.tensorboard:
            writers.append(metrics.TensorBoard(e.stage_directory / "tensorboard"))
        if e.wandb:
            writers.append(metrics.WeightsAndBiases(f"{e.name}/{e.stage}", to_json(e)))
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'jaxchat[{error.name}]'") from None
    return writers


def describe(
    setup: Setup, micro_rows: int, compile_seconds: float, peak: float | None, say: Callable[[str], None]
) -> None:
    """The plan of the run, before it starts."""
    e, counts = setup.experiment, parameter_counts(setup.experiment.model)
    flops = flops_per_token(e.model, e.data.row_length)["total"]
    mesh = " x ".join(f"{name}={size}" for name, size in setup.mesh.shape.items())
    device = setup.mesh.devices.flat[0]
    say(f"{counts['total']:,} parameters  {flops:.3e} FLOPs a token (6 a matrix parameter + attention, not halved)")
    say(
        f"{e.steps:,} steps x {e.batch_tokens:,} tokens = {e.steps * e.batch_tokens:,} tokens  "
        f"micro-batches of {micro_rows} rows x {e.data.row_length}"
    )
    isolated = "isolated" if e.model.isolate_documents else "not isolated"
    peak_text = "unknown peak: no MFU" if peak is None else f"peak {peak / 1e12:.2f} TFLOP/s a device"
    say(
        f"{mesh} on {device.device_kind}  {setup.transformer.dtype}  attention xla, documents {isolated}  "
        f"{peak_text}  compiled in {compile_seconds:.1f} s"
    )
