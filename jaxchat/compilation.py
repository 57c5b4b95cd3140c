"""Compiles an experiment's training step: devices, mesh, shapes, placements, and the micro-batch that fits."""

import dataclasses
import functools
import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxchat import checkpoint, devices, machine, optim, processes, sharding, signals, xla
from jaxchat.data.cache import Log
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.launcher import log
from jaxchat.model.backends import choose_attention
from jaxchat.model.quantized import Float8
from jaxchat.model.transformer import Transformer
from jaxchat.train import Loss, State, init_state, state_placements, train_step

MEMORY_SHARE = 0.92  # Fraction of a device's memory that a compiled step may use.


@dataclass
class Setup:
    """Values derived from an experiment that do not change during training."""

    experiment: Experiment
    mesh: jax.sharding.Mesh
    transformer: Transformer
    tx: optax.GradientTransformation
    abstract: State
    loss: Loss
    """The objective, bound to the transformer for training, the only one with `matmul`."""
    processors: int
    """Of this process at its start, among which XLA divides the work on a CPU."""


class Compiled(NamedTuple):
    """A compiled training step, the rows of its micro-batch, and the seconds that compiling took.

    `tried` has the bytes of a device that each compiled micro-batch needs, by its rows.
    """

    step: Callable[[State, Any], Any]
    rows: int
    seconds: float
    tried: Mapping[int, float]


class OutOfMemory(UserError):
    """A step does not fit in memory. `smaller` is the next smaller micro-batch, None if there is none."""

    def __init__(self, message: str, smaller: int | None) -> None:
        super().__init__(message)
        self.smaller = smaller


def prepare_backend(experiment: Experiment) -> None:
    """Sets the number of CPU devices and the compilation cache directory; must be called before JAX starts."""
    rows = experiment.batch_rows if experiment.micro_rows == "auto" else experiment.micro_rows
    split, count = experiment.mesh.split, processes.joined_count()
    wanted = experiment.mesh.data * split
    own = max(1, (wanted or split * sharding.host_devices(max(1, rows // split))) // count)
    try:
        jax.config.update("jax_num_cpu_devices", own)
    except RuntimeError:  # In a notebook or a test JAX may already be initialized.
        log(f"JAX is already initialized, with {jax.device_count()} devices")
    jax.config.update("jax_compilation_cache_dir", str((experiment.cache_directory / "xla").absolute()))


def warn_of_float8(experiment: Experiment, device: Any, log: Log) -> None:
    """Logs a warning if float8 products are not faster: TPUs before the seventh, GPUs before capability 8.9."""
    slow = device.device_kind.startswith("TPU v") or (devices.capability(device) or 9.0) < 8.9
    if isinstance(experiment.matmul, Float8) and slow:
        log(f"warning: {device.device_kind} has no float8 units: --matmul=float8 rounds like float8 but is not faster")


def make_setup(experiment: Experiment, log: Log, targets: Sequence[Any] | None = None) -> Setup:
    """Derives mesh, model, optimizer and placements. `targets` (default: JAX's devices) may be absent ones, to compile
    for."""
    rows = experiment.batch_rows if experiment.micro_rows == "auto" else experiment.micro_rows
    targets = list(jax.devices() if targets is None else targets)
    dtype, length = devices.compute_dtype(experiment.dtype, targets[0], log), experiment.data.row_length
    warn_of_float8(experiment, targets[0], log)
    attention = choose_attention(
        experiment.attention, experiment.model, length=length, dtype=dtype, device=targets[0], log=log
    )
    transformer = Transformer(experiment.model, dtype, attention)
    try:
        mesh = sharding.make_mesh(experiment.mesh, rows=rows, devices=targets)
        if mesh.size < len(targets) and processes.joined_count() > 1:
            part = f"{mesh.size} of the {len(targets)} devices of {processes.joined_count()} processes"
            raise ValueError(f"the mesh uses {part}, but every device must take part: leave out --mesh.data")
        axes = transformer.axes()
        tx = optim.make(experiment.optimizer, transformer.specs(), steps=experiment.steps, dtype=transformer.dtype)
        shapes = jax.eval_shape(lambda: init_state(transformer, tx, jax.random.key(0)))
        abstract = checkpoint.abstract_like(shapes, state_placements(mesh, shapes, axes))
    except ValueError as error:
        raise UserError(str(error)) from None
    loss = functools.partial(experiment.objective, dataclasses.replace(transformer, matmul=experiment.matmul))
    return Setup(experiment, mesh, transformer, tx, abstract, loss, machine.cores())


def environment(setup: Setup) -> dict[str, Any]:
    """What the last bits of a step depend on besides its experiment: mesh, kind of device, the number of processors if
    it is a CPU, and versions."""
    device = setup.mesh.devices.flat[0]
    cores = {"processors": setup.processors} if device.platform == "cpu" else {}
    versions = {"jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib")}
    return {"mesh": dict(setup.mesh.shape), "device": device.device_kind, **cores, **versions}


def compile_step(setup: Setup, log: Log) -> Compiled:
    """Compiles the training step.

    With micro_rows "auto" it is the largest micro-batch whose memory, by the compiler's own analysis, fits a device.

    Raises:
        OutOfMemory: no micro-batch fits.
    """
    e = setup.experiment
    limit = MEMORY_SHARE * min(processes.gather(devices.memory_limit(jax.local_devices()[0]))) - reference_bytes(setup)
    start, state = time.perf_counter(), state_bytes(setup)
    if e.micro_rows == "auto" and state > limit:
        needs = f"the training state needs {state / 2**30:.1f} GiB of a device's {limit / 2**30:.1f}"
        raise OutOfMemory(f"{needs}: split it over several with --mesh.fsdp, or take a smaller --depth", None)
    choices = micro_choices(setup) if e.micro_rows == "auto" else [e.micro_rows]
    tried: dict[int, float] = {}
    while choices:
        rows = choices[0]
        log(f"compiling the training step with micro_rows={rows}")
        compiled, tried[rows] = compile_lowered(lower_step(setup, rows), setup, log)
        if compiled is not None and (tried[rows] <= limit or e.micro_rows != "auto"):
            return Compiled(_guarded(compiled, setup, rows), rows, time.perf_counter() - start, tried)
        if choices := smaller_choices(choices, tried[rows], state=state, limit=limit):
            log(f"micro_rows={rows} needs {tried[rows] / 2**30:.1f} of {limit / 2**30:.1f} GiB; trying {choices[0]}")
    raise _out_of_memory(setup, rows)


def smaller_choices(choices: Sequence[int], needed: float, *, state: float, limit: float) -> list[int]:
    """The micro-batches that may fit in `limit` bytes after the largest, the first of `choices`, needed `needed`.

    The memory beyond the training state grows with the rows, so those that cannot fit are left out, but for the
    smallest, which decides whether any fits. Empty after the smallest.
    """
    most = choices[0] * (limit - state) / (needed - state) if state < needed < math.inf else choices[0] / 2
    return [n for n in choices[1:] if n <= most] or list(choices[1:][-1:])


def compile_lowered(lowered: Any, setup: Setup, log: Log) -> tuple[Any, float]:
    """A program compiled with the experiment's XLA settings, and the bytes that it needs per device. If the compiler
    runs out of memory: None, and the bytes that its message names, or infinity.

    A setting that this compiler does not know is left out and logged.
    """
    options = xla.options(setup.experiment.xla, setup.mesh.devices.flat[0].platform)
    while True:
        try:
            compiled = lowered.compile(compiler_options=dict(options) or None)
            signals.check()
            return compiled, step_bytes(compiled)
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            if "RESOURCE_EXHAUSTED" in message:
                size = re.search(r"(?:Used|required for[^(]*\() ?([\d.]+)([KMGT])", message)
                return None, float(size[1]) * 1024 ** ("KMGT".index(size[2]) + 1) if size else math.inf
            unknown = re.search(r"No such compile option: '(\w+)'", message)
            if unknown is None or unknown[1] not in options:
                raise
        log(f"this compiler has no setting {unknown[1]}: compiling without it")
        del options[unknown[1]]


def state_bytes(setup: Setup) -> float:
    """Bytes per device of the training state."""
    return _bytes_per_device(setup.abstract)


def reference_bytes(setup: Setup) -> float:
    """Bytes per device of the KL reference of RL, which lies beside the step. Engines free theirs before a step."""
    e = setup.experiment
    return 0.0 if e.rl is None or e.rl.kl is None else _bytes_per_device(setup.abstract.params)


def _bytes_per_device(tree: Any) -> float:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def lower_step(setup: Setup, rows: int) -> Any:
    """The training step lowered for micro-batches of `rows` rows."""
    e = setup.experiment
    step = functools.partial(train_step, loss=setup.loss, tx=setup.tx, seed=e.seed)
    placed = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec(None, sharding.BATCH))
    lead = (e.batch_rows // rows, rows)
    batch = {
        name: jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=placed)
        for name, (shape, dtype) in e.objective.columns(e.model, e.data.row_length).items()
    }
    if e.objective.ragged:
        batch["count"] = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(setup.mesh))
    placements = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placements, None))
    return jitted.lower(setup.abstract, batch)


def step_bytes(compiled: Any) -> float:
    """Bytes per device that a compiled step needs: arguments, outputs that are not aliased, and temporaries."""
    m = compiled.memory_analysis()
    if m is None:
        return 0.0
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def micro_choices(setup: Setup) -> list[int]:
    """Sizes of a micro-batch, in rows, that divide the batch and that the mesh divides; largest first."""
    n, ways = setup.experiment.batch_rows, sharding.shards(setup.mesh)
    return [rows for rows in range(n, 0, -1) if n % rows == 0 and rows % ways == 0]


def _out_of_memory(setup: Setup, rows: int) -> OutOfMemory:
    message = f"the step does not fit in memory with micro_rows={rows}"
    smaller = max((n for n in micro_choices(setup) if n < rows), default=None)
    if smaller is not None:
        message = f"{message}: set --micro_rows={smaller}"
    elif setup.experiment.model.remat != "full":
        message = f"{message}: set --model.remat=full"
    else:
        message = f"{message} and remat=full: use more devices with --mesh.fsdp"
    return OutOfMemory(message, smaller)


def _guarded(compiled: Any, setup: Setup, rows: int) -> Callable[[State, Any], Any]:
    """The compiled step; if it runs out of memory, it raises a UserError that names a smaller setting."""

    def step(state: State, batch: Any) -> Any:
        try:
            return compiled(state, batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise _out_of_memory(setup, rows) from error
            raise

    return step
