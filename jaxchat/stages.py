"""Stages: which rows, which objective, which evaluations; everything between a configuration and the loop."""

import contextlib
import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxchat import checkpoint, metrics, optim, sharding
from jaxchat.config import UserError, to_json
from jaxchat.data import prepare, streams
from jaxchat.experiment import RESUMABLE, Experiment
from jaxchat.model.transformer import Transformer, flops_per_token, parameter_counts
from jaxchat.objectives.likelihood import likelihood
from jaxchat.objectives.logprobs import weighted_nll
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import Cadence, Hooks, State, fit, init_state, state_placements, train_step

MEMORY_SHARE = 0.92  # Of a device's memory, what a compiled step may plan with.


@dataclass
class Setup:
    """A stage ready to run: everything derived from the experiment that does not change during training."""

    experiment: Experiment
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    transformer: Transformer
    tx: optax.GradientTransformation
    abstract: State


def prepare_backend(experiment: Experiment) -> None:
    """Before JAX starts: how many devices the CPU backend shows, and where compiled programs are kept."""
    rows = experiment.batch_rows if experiment.micro_rows == "auto" else experiment.micro_rows
    wanted = experiment.mesh.data * experiment.mesh.fsdp * experiment.mesh.tensor
    split = experiment.mesh.fsdp * experiment.mesh.tensor
    try:
        jax.config.update("jax_num_cpu_devices", wanted or split * sharding.host_devices(max(1, rows // split)))
    except RuntimeError:  # In a notebook or a test the backend may run already.
        print(f"JAX runs already, with {jax.device_count()} devices", file=sys.stderr)
    jax.config.update("jax_compilation_cache_dir", str((experiment.cache_directory / "xla").absolute()))


def compute_dtype(experiment: Experiment, say: Callable[[str], None]) -> Any:
    """bfloat16 on accelerators that have it, float32 elsewhere."""
    if experiment.dtype != "auto":
        return jnp.dtype(experiment.dtype)
    device = jax.devices()[0]
    if device.platform == "gpu" and float(getattr(device, "compute_capability", "8.0")) < 8.0:
        say(f"{device.device_kind} has no fast bfloat16: computing in float32")
        return jnp.dtype("float32")
    return jnp.dtype("float32" if device.platform == "cpu" else "bfloat16")


def run(experiment: Experiment) -> dict[str, Any]:
    """Runs one stage to its end, from wherever it stands; returns the launcher's result."""
    terminal = metrics.Terminal(experiment.steps)
    checkpoint.check_same(experiment.stage_directory, experiment, RESUMABLE)
    tokenizer = prepare.ensure_tokenizer(
        experiment.data, experiment.cache_directory, seed=experiment.seed, log=terminal.say
    )
    keep_tokenizer(experiment.run_directory, tokenizer)
    rows = {
        split: prepare.ensure_rows(experiment.data, tokenizer, split, experiment.cache_directory, log=terminal.say)
        for split in ("train", "val")
    }
    setup = make_setup(experiment, tokenizer, terminal.say)
    checkpoint.write_experiment(experiment.stage_directory, experiment)
    write_manifests(experiment, rows)
    peak = metrics.peak_flops(setup.mesh.devices.flat[0])
    with jax.set_mesh(setup.mesh):
        return _train(setup, rows, peak, terminal)


def make_setup(experiment: Experiment, tokenizer: Tokenizer, say: Callable[[str], None]) -> Setup:
    """Mesh, model, optimizer, and the abstract state with its placements."""
    rows = experiment.batch_rows if experiment.micro_rows == "auto" else experiment.micro_rows
    transformer = Transformer(experiment.model, compute_dtype(experiment, say))
    try:
        mesh = sharding.make_mesh(experiment.mesh, rows=rows)
        axes = transformer.axes()
        tx = optim.make(experiment.optimizer, axes, steps=experiment.steps, dtype=transformer.dtype)
        shapes = jax.eval_shape(lambda: init_state(transformer, tx, jax.random.key(0)))
        abstract = checkpoint.abstract_like(shapes, state_placements(mesh, shapes, axes))
    except ValueError as error:
        raise UserError(str(error)) from None
    return Setup(experiment, tokenizer, mesh, transformer, tx, abstract)


def _train(setup: Setup, rows: dict[str, Any], peak: float | None, terminal: metrics.Terminal) -> dict[str, Any]:
    e = setup.experiment
    step, micro_rows, compile_seconds = compile_step(setup, terminal.say)
    describe(setup, micro_rows, compile_seconds, peak, terminal.say)
    checkpoints = checkpoint.Checkpoints(e.stage_directory, keep=e.keep)
    start, state, facts = _start(setup, checkpoints, terminal.say)
    writers = make_writers(e, start, terminal)
    evaluate = Evaluation(setup, rows["val"], micro_rows)
    log = StepLog(setup, peak, writers)
    results: dict[str, Any] = {"val_bpb": facts.get("val_bpb")}
    held_out = sum(map(len, rows["val"]))

    def save(number: int, state: State) -> None:
        checkpoints.save(number, state, {"val_bpb": results["val_bpb"], "tokens": number * e.batch_tokens})

    def score(number: int, state: State, last: bool) -> None:
        checkpoints.wait()
        wanted = held_out if last or not e.eval_rows else min(e.eval_rows, held_out)
        # Never more tokens than the run trains on, so that a trial of a large model ends soon.
        results["val_rows"] = min(wanted, e.steps * e.batch_rows)
        results["val_bpb"] = evaluate(state.params, results["val_rows"])
        for writer in writers:
            writer.write({"step": number, "val_bpb": results["val_bpb"], "val_rows": results["val_rows"]})

    def sample(number: int, state: State) -> None:
        write_samples(setup, state, number, terminal.say)

    stream = streams.RowStream(
        rows["train"],
        e.data.weights,
        seed=e.seed,
        batch_rows=e.batch_rows,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    with interruptions() as interrupted, contextlib.ExitStack() as stack:
        stack.callback(lambda: [writer.close() for writer in writers])
        stack.callback(checkpoints.close)
        batches = device_batches(setup, stream, start, micro_rows)
        hooks = Hooks(log, save, score, sample, interrupted)
        cadence = Cadence(e.save_every, e.eval_every, e.sample_every)
        state = fit(state, step, batches, steps=e.steps, cadence=cadence, hooks=hooks)
        checkpoints.wait()
        if results["val_bpb"] is None or start == e.steps:
            score(e.steps, state, True)
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
        if number > e.steps:
            raise UserError(f"{e.stage_directory} is at step {number} already: ask for more than --steps={e.steps}")
        say(f"continuing from step {number:,}")
        return number, state, facts
    placed = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    make = functools.partial(init_state, setup.transformer, setup.tx)
    return 0, jax.jit(make, out_shardings=placed)(jax.random.key(e.seed)), {}


def compile_step(setup: Setup, say: Callable[[str], None]) -> tuple[Any, int, float]:
    """The compiled step, the rows of a micro-batch, and the seconds it took.

    With micro_rows "auto" it is the largest micro-batch whose memory, by the compiler's own analysis, fits a device.
    """
    e = setup.experiment
    limit = MEMORY_SHARE * metrics.memory_limit(setup.mesh.devices.flat[0])
    start = time.perf_counter()
    choices = _micro_choices(setup) if e.micro_rows == "auto" else [e.micro_rows]
    for i, rows in enumerate(choices):
        smaller = choices[i + 1] if i + 1 < len(choices) else None
        try:
            compiled = lower_step(setup, rows).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed = math.inf
        else:
            needed = step_bytes(compiled)
        if needed <= limit or (e.micro_rows != "auto" and needed < math.inf):
            return _guarded(compiled, e, rows), rows, time.perf_counter() - start
        if smaller is not None:
            say(f"micro_rows={rows} would need {needed / 2**30:.1f} GiB of {limit / 2**30:.1f}; trying {smaller}")
    raise UserError(_out_of_memory(e, choices[-1]))


def lower_step(setup: Setup, rows: int) -> Any:
    """The training step lowered for micro-batches of `rows` rows."""
    e = setup.experiment
    step = functools.partial(train_step, objective=likelihood(setup.transformer), tx=setup.tx)
    shape = (e.batch_rows // rows, rows, e.data.row_length)
    placed = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec(None, sharding.BATCH))
    types = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, "segments": jnp.int32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for name, dtype in types.items()}
    placements = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placements, None))
    return jitted.lower(setup.abstract, batch)


def step_bytes(compiled: Any) -> float:
    """Bytes of one device that a compiled step needs: arguments, outputs that are not aliased, temporaries."""
    m = compiled.memory_analysis()
    if m is None:
        return 0.0
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def _micro_choices(setup: Setup) -> list[int]:
    """Row counts that divide the batch and that the mesh divides, largest first."""
    n, ways = setup.experiment.batch_rows, setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
    return [rows for rows in range(n, 0, -1) if n % rows == 0 and rows % ways == 0]


def _out_of_memory(e: Experiment, rows: int) -> str:
    if rows > 1:
        smaller = max(n for n in range(1, rows) if e.batch_rows % n == 0)
        return f"the step does not fit in memory with micro_rows={rows}: set --micro_rows={smaller}"
    if e.model.remat != "full":
        return "the step does not fit in memory with micro_rows=1: set --model.remat=full"
    return "the step does not fit in memory with micro_rows=1 and remat=full: use more devices with --mesh.fsdp"


def _guarded(compiled: Any, e: Experiment, rows: int) -> Callable[[State, Any], Any]:
    """The compiled step; running out of memory while it runs names the next smaller setting."""

    def step(state: State, batch: Any) -> Any:
        try:
            return compiled(state, batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise UserError(_out_of_memory(e, rows)) from error
            raise

    return step


def device_batches(
    setup: Setup, stream: streams.RowStream, start: int, micro_rows: int
) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """Batches on the devices as (micro-batches, rows, ...), read ahead in a thread."""
    e = setup.experiment
    micro = e.batch_rows // micro_rows
    for index, batch in stream.prefetch(start, e.steps):
        cut = {name: column.reshape(micro, -1, *column.shape[1:]) for name, column in batch.items()}
        yield index, sharding.put_batch(setup.mesh, cut)


class Evaluation:
    """Bits per byte on held-out rows: nats over ln 2 times the bytes of the targets; specials count for neither."""

    def __init__(self, setup: Setup, rows: Any, micro_rows: int) -> None:
        self._setup, self._rows, self._micro_rows = setup, rows, micro_rows
        self._bytes = jax.device_put(
            jnp.asarray(setup.tokenizer.bytes_per_token, jnp.float32), sharding.replicated(setup.mesh)
        )
        transformer, c = setup.transformer, setup.transformer.config

        def score(params: Any, batch: Any, bytes_V: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden_BTM, _ = transformer.apply(params, batch["tokens"], segments_BT=batch["segments"])
            bytes_BT = bytes_V[batch["targets"]] * batch["weights"]
            counted_BT = (bytes_BT > 0).astype(jnp.float32)
            nats = weighted_nll(
                hidden_BTM, transformer.head(params), batch["targets"], counted_BT, vocab=c.vocab, softcap=c.softcap
            )
            return nats, bytes_BT.sum()

        self._score = jax.jit(score)

    def __call__(self, params: Any, limit: int) -> float:
        """Over `limit` rows."""
        nats = length = 0.0
        batches = streams.every_row_once(
            self._rows, self._micro_rows, host=jax.process_index(), hosts=jax.process_count(), limit=limit
        )
        for batch in batches:
            placed = sharding.put_batch(self._setup.mesh, {name: column[None] for name, column in batch.items()})
            one = {name: column[0] for name, column in placed.items()}
            nats_here, bytes_here = self._score(params, one, self._bytes)
            nats, length = nats + float(nats_here), length + float(bytes_here)
        return nats / (math.log(2) * max(length, 1.0))


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
        record = {
            "step": number,
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate_factor": float(self._rate(np.float64(number - 1))),
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


def write_samples(setup: Setup, state: State, number: int, say: Callable[[str], None]) -> None:
    """Continues each prompt greedily and appends the texts to samples.md."""
    from jaxchat.decode.engine import Engine, SamplingParams

    e = setup.experiment
    if jax.process_count() > 1:
        return
    engine = Engine(setup.transformer, state.params, setup.tokenizer, length=min(128, e.data.row_length))
    lines = [f"\n## Step {number}\n"]
    for prompt in e.prompts:
        answer = engine.complete(prompt, SamplingParams(temperature=0.0, max_tokens=64))
        lines.append(f"- **{prompt}**{answer.text}\n")
        say(f"  | {prompt}{answer.text}")
    with (e.stage_directory / "samples.md").open("a", encoding="utf-8") as file:
        file.writelines(lines)


def keep_tokenizer(run_directory: Path, tokenizer: Tokenizer) -> None:
    """The run's own copy of the tokenizer; another one there already belongs to another experiment."""
    place = run_directory / "tokenizer"
    if place.exists():
        if Tokenizer.load(place).hash != tokenizer.hash:
            raise UserError(
                f"{place} is another tokenizer than this experiment's: its checkpoints would not fit; "
                "give the experiment its own --name"
            )
        return
    tokenizer.save(place)


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


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM and SIGINT only set a flag, which the returned function tells; a second SIGINT stops at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
