"""Meshes and placements: the one file that names mesh axes.

Parameters and activations carry logical axes; a rule table maps each to mesh axes. `data` replicates the parameters,
`fsdp` splits them along their width, `tensor` splits heads, hidden units and the vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxchat.errors import UserError
from jaxchat.machine import cores

MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

Rules = Mapping[str, str | tuple[str, ...] | None]

TRAIN_RULES: Rules = {
    # parameters
    "embed": "fsdp",
    "vocab": "tensor",
    "tokens": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "hidden": "tensor",
    "head": None,
    "gate": None,
    "layers": None,
    # activations
    "batch": BATCH,
    "length": None,
    "width": None,
    "shards": BATCH,
    # the optimizer's stacks of matrices: each device orthogonalises its share; `data` last, for parameters are whole
    # along it, so that no device sends what another has
    "stack": ("fsdp", "tensor", "data"),
    "gathered_stack": ("fsdp", "tensor"),
}

ADDING: Rules = {**TRAIN_RULES, "by_data": "data", "by_fsdp": "fsdp"}

# A step of decoding reads every parameter: gathering their width each time would cost more than holding it whole.
DECODE_RULES: Rules = {**TRAIN_RULES, "embed": None, "tokens": None}


@dataclass(frozen=True)
class Mesh:
    """How many ways each mesh axis splits; `data=0` takes every device that is left."""

    data: int = 0
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.data < 0 or min(self.fsdp, self.tensor) < 1:
            raise ValueError(f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor}: sizes must be positive")


def host_devices(rows: int) -> int:
    """How many devices the CPU backend should show: the largest divisor of `rows` up to min(cores, 8)."""
    most = min(cores(), 8)
    return max(n for n in range(1, most + 1) if rows % n == 0)


def make_mesh(config: Mesh, *, rows: int, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over all devices; raises ValueError where it does not fit them or the `rows` of a micro-batch."""
    devices = list(jax.devices() if devices is None else devices)
    data = config.data or max(1, len(devices) // (config.fsdp * config.tensor))
    sizes = (data, config.fsdp, config.tensor)
    if math.prod(sizes) > len(devices) or (config.data == 0 and math.prod(sizes) != len(devices)):
        raise ValueError(
            f"mesh data={data} fsdp={config.fsdp} tensor={config.tensor} does not fit {len(devices)} devices"
        )
    if rows % (data * config.fsdp):
        raise ValueError(
            f"a micro-batch of {rows} rows does not divide over data={data} x fsdp={config.fsdp}: "
            f"set micro_rows and batch_tokens to a multiple of {data * config.fsdp} rows, or a smaller mesh"
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[: math.prod(sizes)])


def decoding_mesh(config: Mesh) -> jax.sharding.Mesh | None:
    """The mesh that a model is read on: None where that is one device; on a CPU, as many host devices as it wants.

    Raises:
        UserError: there are fewer devices.
    """
    with contextlib.suppress(RuntimeError):  # In a notebook or a test the backend may run already.
        jax.config.update("jax_num_cpu_devices", (config.data or 1) * config.fsdp * config.tensor)
    devices = jax.local_devices()  # Each of several processes reads the model by itself.
    if len(devices) == config.fsdp == config.tensor == 1 and config.data < 2:
        return None
    try:
        return make_mesh(config, rows=0, devices=devices)
    except ValueError as error:
        raise UserError(str(error)) from None


def spec(axes: Sequence[str | None], rules: Rules = TRAIN_RULES) -> PartitionSpec:
    """The placement of logical `axes`; raises ValueError when two of them need the same mesh axis."""
    entries = [None if name is None else rules[name] for name in axes]
    owner: dict[str, str] = {}
    for name, entry in zip(axes, entries, strict=True):
        for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
            if mesh_axis in owner:
                raise ValueError(f"axes {owner[mesh_axis]} and {name} are both placed on mesh axis {mesh_axis}")
            owner[mesh_axis] = str(name)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, axes: Sequence[str | None], rules: Rules = TRAIN_RULES) -> jax.Array:
    """Places an array inside jit by its logical axes, where a mesh is set; otherwise leaves it alone.

    A dimension that its mesh axes do not divide stays whole: one row being decoded, say.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting(mesh, x, axes, rules))


def on_each_device(
    call: Callable[..., jax.Array], arrays: Sequence[jax.Array], axes: Sequence[Sequence[str | None]]
) -> jax.Array:
    """`call` of the arrays, run by every device of the mesh that is set on its own part of them by their logical axes.

    For kernels that the compiler cannot split. `call` must need no other device's part, and its result must lie as the
    first array does. A dimension that its mesh axes do not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return call(*arrays)
    places = tuple(_fitting(mesh, x, names) for x, names in zip(arrays, axes, strict=True))
    # Kernels do not say along which axes their results vary, so that cannot be checked.
    mapped = jax.shard_map(call, mesh=mesh, in_specs=places, out_specs=places[0], check_vma=False)
    return mapped(*arrays)


def _fitting(mesh: Any, x: jax.Array, axes: Sequence[str | None], rules: Rules = TRAIN_RULES) -> PartitionSpec:
    """The placement of an array, whole along every dimension that its mesh axes do not divide."""
    entries = spec(axes, rules)
    return PartitionSpec(*(e if size % _ways(mesh, e) == 0 else None for size, e in zip(x.shape, entries, strict=True)))


def add_shards(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """The sum over the first axis, one term a batch shard, placed by the logical `axes` of the others.

    In two steps, one a mesh axis: the sum over `fsdp` is scattered as it is made, and that over `data`, along which
    parameters are whole, can wait until all micro-batches are added.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x.sum(axis=0)
    ways = tuple(mesh.shape[axis] for axis in BATCH)
    inside = (None,) * len(axes)
    x = constrain(x.reshape(*ways, *x.shape[1:]), ("by_data", "by_fsdp", *inside), ADDING)
    x = constrain(x.sum(axis=1), ("by_data", *axes), ADDING)
    return constrain(x.sum(axis=0), axes)


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work` in a thread of its own, where no mesh is set and nothing is traced: on this process's first device.

    Under a mesh JAX lays every new array on all of its devices, those of other processes too, who know nothing of it.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work, *arguments).result()


def batch_shards() -> int:
    """In how many parts the mesh that is set splits a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else shards(mesh)


def device_count() -> int:
    """Devices of the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def placements(mesh: jax.sharding.Mesh, shapes: Any, axes: Any, rules: Rules = TRAIN_RULES) -> Any:
    """A tree of shardings for a tree of shapes and the equal tree of logical axes; sizes must divide."""

    def place(path: Any, shape: Any, names: Sequence[str]) -> NamedSharding:
        placed = spec(names, rules)
        for size, name, entry in zip(shape.shape, names, placed, strict=True):
            ways = _ways(mesh, entry)
            if size % ways:
                where = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(
                    f"{name}={size} of {where} is not a multiple of {entry}={ways}: choose another --mesh.{entry}"
                )
        return NamedSharding(mesh, placed)

    return jax.tree_util.tree_map_with_path(place, shapes, axes)


def _ways(mesh: Any, entry: str | Sequence[str] | None) -> int:
    """In how many parts an entry of a placement splits its dimension."""
    return math.prod(mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows, the first axis, split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def shards(mesh: Any) -> int:
    """In how many parts a mesh splits a batch."""
    return _ways(mesh, BATCH)


def own_rows(mesh: jax.sharding.Mesh, rows: int) -> list[int]:
    """Which of a micro-batch's rows lie on devices of this process, in order."""
    placed = by_rows(mesh).addressable_devices_indices_map((rows,))
    return sorted({row for index in placed.values() for row in range(rows)[(index or (slice(None),))[0]]})


def put_batch(mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Columns (micro-batches, this process's `own_rows`, ...) as global arrays of (micro-batches, rows, ...)."""
    placed, ways = NamedSharding(mesh, PartitionSpec(None, BATCH)), shards(mesh)

    def put(column: np.ndarray) -> jax.Array:
        rows = column.shape[1] * ways // len(own_rows(mesh, ways))
        own = own_rows(mesh, rows)

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(rows)
            first = np.searchsorted(own, start)
            return column[:, first : first + stop - start]

        return jax.make_array_from_callback((len(column), rows, *column.shape[2:]), placed, part)

    return {name: put(column) for name, column in batch.items()}


def put_whole(mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Columns (micro-batches, rows, ...) that every process has whole, as global arrays."""
    return put_batch(mesh, {name: column[:, own_rows(mesh, column.shape[1])] for name, column in batch.items()})
