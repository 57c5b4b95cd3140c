"""Meshes and placements: the only file that names mesh axes.

Parameters and activations carry logical axes; a rule table maps each to mesh axes. `data` replicates the parameters,
`fsdp` splits them along their width, `tensor` splits heads, hidden units and the vocabulary, and `expert` splits
experts and replicates the others.
"""

import contextlib
import dataclasses
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

BATCH = ("data", "fsdp", "expert")

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
    "buckets": None,
    "latent": None,
    "experts": "expert",
    "routes": None,
    "layers": None,
    # activations
    "batch": BATCH,
    "expert_batch": ("data", "fsdp"),
    "length": None,
    "width": None,
    "shards": BATCH,
    # the optimizer's stacks of matrices: each device orthogonalises its share; `data` is last, because parameters are
    # replicated along it and no device should send what another already has
    "stack": ("expert", "fsdp", "tensor", "data"),
    "gathered_stack": ("expert", "fsdp", "tensor"),
}

ADDING: Rules = {**TRAIN_RULES, "by_data": "data", "by_fsdp": "fsdp", "by_expert": "expert"}

# A decoding step reads every parameter: gathering their width each time would cost more than replicating it.
DECODE_RULES: Rules = {**TRAIN_RULES, "embed": None, "tokens": None}


@dataclass(frozen=True)
class Mesh:
    """Number of devices along each mesh axis."""

    data: int = 0  # Devices that split the batch; 0 uses all that remain.
    fsdp: int = 1  # Devices that split the batch and the parameters.
    tensor: int = 1  # Devices that split heads, hidden units and vocabulary.
    expert: int = 1  # Devices that split the batch and the experts.

    def __post_init__(self) -> None:
        if self.data < 0 or min(size for name, size in self.sizes.items() if name != "data") < 1:
            raise ValueError(f"mesh {self}: sizes must be positive")

    @property
    def sizes(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def split(self) -> int:
        """Number of devices for one slice of `data`."""
        return math.prod(size for name, size in self.sizes.items() if name != "data")

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())


def host_devices(rows: int) -> int:
    """Number of devices the CPU backend should expose: the largest divisor of `rows` up to min(cores, 8)."""
    most = min(cores(), 8)
    return max(n for n in range(1, most + 1) if rows % n == 0)


def make_mesh(config: Mesh, *, rows: int, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: all). Raises ValueError if it does not fit them or a micro-batch's `rows`."""
    devices = list(jax.devices() if devices is None else devices)
    mesh = dataclasses.replace(config, data=config.data or max(1, len(devices) // config.split))
    sizes, count = mesh.sizes, mesh.data * mesh.split
    if count > len(devices) or (config.data == 0 and count != len(devices)):
        raise ValueError(
            f"mesh {mesh} does not fit {len(devices)} devices: choose --mesh sizes with the product {len(devices)}"
        )
    if rows % (ways := math.prod(sizes[axis] for axis in BATCH)):
        named = " x ".join(f"{axis}={sizes[axis]}" for axis in BATCH)
        raise ValueError(
            f"a micro-batch of {rows} rows does not divide over {named}: "
            f"set micro_rows and batch_tokens to a multiple of {ways} rows, or a smaller mesh"
        )
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices[:count])


def decoding_mesh(config: Mesh) -> jax.sharding.Mesh | None:
    """The mesh for decoding on this process's devices, None for one device; a CPU exposes as many as the mesh needs.

    Raises:
        UserError: the mesh does not fit the devices.
    """
    with contextlib.suppress(RuntimeError):  # In a notebook or a test JAX may already be initialized.
        jax.config.update("jax_num_cpu_devices", (config.data or 1) * config.split)
    devices = jax.local_devices()  # Each process decodes by itself.
    if len(devices) == config.split == 1 and config.data < 2:
        return None
    try:
        return make_mesh(config, rows=0, devices=devices)
    except ValueError as error:
        raise UserError(str(error)) from None


def spec(axes: Sequence[str | None], rules: Rules = TRAIN_RULES) -> PartitionSpec:
    """The placement of logical `axes`. Raises ValueError for an unknown one, and if two need the same mesh axis."""
    if unknown := [name for name in axes if name is not None and name not in rules]:
        raise ValueError(f"logical axis {unknown[0]!r} has no row in TRAIN_RULES")
    entries = [None if name is None else rules[name] for name in axes]
    owner: dict[str, str] = {}
    for name, entry in zip(axes, entries, strict=True):
        for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
            if mesh_axis in owner:
                raise ValueError(f"axes {owner[mesh_axis]} and {name} are both placed on mesh axis {mesh_axis}")
            owner[mesh_axis] = str(name)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, axes: Sequence[str | None], rules: Rules = TRAIN_RULES) -> jax.Array:
    """Places an array inside jit by its logical axes; without a current mesh returns it unchanged.

    A dimension that its mesh axes do not divide stays whole, for example a single row in decoding.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting(mesh, x, axes, rules))


def on_each_device(
    call: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    axes: Sequence[Sequence[str | None]],
    *,
    summed: Sequence[str] = (),
) -> jax.Array:
    """Runs `call` on every device of the current mesh, on the device's own shard of each array by its logical axes.

    For kernels that the compiler cannot partition. `call` must not need other shards, and its result is placed like the
    first array. Results for shards of the `summed` logical axes are added. A dimension that its mesh axes do not divide
    stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return call(*arrays)
    places = tuple(_fitting(mesh, x, names) for x, names in zip(arrays, axes, strict=True))
    over = {entry: None for names, place in zip(axes, places) for name, entry in zip(names, place) if name in summed}
    added = tuple(entry for entry in over if entry is not None)

    def local(*shards: jax.Array) -> jax.Array:
        return jax.lax.psum(call(*shards), added) if added else call(*shards)

    # Kernels do not declare along which mesh axes their results vary, so this cannot be checked.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=places[0], check_vma=False)
    return mapped(*arrays)


def _fitting(mesh: Any, x: jax.Array, axes: Sequence[str | None], rules: Rules = TRAIN_RULES) -> PartitionSpec:
    """The placement of an array; a dimension that its mesh axes do not divide stays whole."""
    entries = spec(axes, rules)
    return PartitionSpec(*(e if size % _ways(mesh, e) == 0 else None for size, e in zip(x.shape, entries, strict=True)))


def add_shards(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Sums over the first axis, one term per batch shard; the result is placed by the logical `axes` of the others.

    In two steps: the sum over `fsdp` is a reduce-scatter; the sum over `data` and `expert`, which replicate these
    parameters, can be deferred until all micro-batches are added.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x.sum(axis=0)
    ways = tuple(mesh.shape[axis] for axis in BATCH)
    inside = (None,) * len(axes)
    x = constrain(x.reshape(*ways, *x.shape[1:]), ("by_data", "by_fsdp", "by_expert", *inside), ADDING)
    x = constrain(x.sum(axis=1), ("by_data", "by_expert", *axes), ADDING)
    return constrain(x.sum(axis=(0, 1)), axes)


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """Runs `work` in a separate thread, outside of any mesh or trace, on this process's first device.

    Under a mesh JAX would place new arrays on all devices, including those of processes that do not run `work`.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work, *arguments).result()


def batch_shards() -> int:
    """Number of batch shards of the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else shards(mesh)


def device_count() -> int:
    """Number of devices of the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def platform() -> str:
    """Platform that the current program is for: that of the mesh's devices, which may be absent (`launch.plan`), or
    without a mesh JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else str(device.platform)


def placements(mesh: jax.sharding.Mesh, shapes: Any, axes: Any, rules: Rules = TRAIN_RULES) -> Any:
    """Shardings for a tree of shapes and its tree of logical axes. Raises ValueError if a size does not divide."""

    def place(path: Any, shape: Any, names: Sequence[str]) -> NamedSharding:
        placed = spec(names, rules)
        for size, name, entry in zip(shape.shape, names, placed, strict=True):
            ways = _ways(mesh, entry)
            if size % ways:
                where = ".".join(step.key for step in path if hasattr(step, "key"))  # Alike in every layer.
                raise ValueError(
                    f"{name}={size} of {where} is not a multiple of {entry}={ways}: choose another --mesh.{entry}"
                )
        return NamedSharding(mesh, placed)

    return jax.tree_util.tree_map_with_path(place, shapes, axes)


def _ways(mesh: Any, entry: str | Sequence[str] | None) -> int:
    """Number of shards into which an entry of a placement splits its dimension."""
    return math.prod(mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding that splits rows, the first axis, over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def shards(mesh: Any) -> int:
    """Number of batch shards of a mesh."""
    return _ways(mesh, BATCH)


def own_rows(mesh: jax.sharding.Mesh, rows: int) -> list[int]:
    """Indices of a micro-batch's rows on this process's devices, in order."""
    placed = by_rows(mesh).addressable_devices_indices_map((rows,))
    return sorted({row for index in placed.values() for row in range(rows)[(index or (slice(None),))[0]]})


def put_batch(mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays (micro-batches, rows, ...) of columns (micro-batches, this process's `own_rows`, ...)."""
    placed, ways = NamedSharding(mesh, PartitionSpec(None, BATCH)), shards(mesh)

    def put(column: np.ndarray) -> jax.Array:
        rows = column.shape[1] * ways // len(own_rows(mesh, ways))
        own = own_rows(mesh, rows)

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(rows)
            first = np.searchsorted(own, start)
            return column[:, first : first + stop - start]

        return jax.make_array_from_callback((len(column), rows, *column.shape[2:]), placed, shard)

    return {name: put(column) for name, column in batch.items()}


def put_whole(mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes global arrays of columns (micro-batches, rows, ...) that every process has in full."""
    return put_batch(mesh, {name: column[:, own_rows(mesh, column.shape[1])] for name, column in batch.items()})
