"""Compiles the engine's decoding steps ahead of time for absent hardware."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxchat import sharding
from jaxchat.decode import programs
from jaxchat.decode.sampling import SamplingParams, pack
from jaxchat.experiment import Experiment
from jaxchat.launcher import log
from jaxchat.model.choice import choose_decoding
from jaxchat.model.transformer import Transformer
from jaxchat.planning.chips import GiB, Topology
from jaxchat.sharding import Mesh, make_mesh

ROWS, STEPS = 64, 8  # Rows per chip, as in RL sampling, and decoding steps per dispatch.


def lower_decode(e: Experiment, topology: Topology, rows: int, *, tensor: int = 1, decoding: str = "auto") -> Any:
    """Lowers the engine's decoding steps for `rows` rows of the experiment's length on all chips.

    Sampling is at temperature 1, in bfloat16. `decoding` is the attention backend; "auto" chooses it for the chips.
    """
    devices, length, dtype = topology.devices(), e.data.row_length, jnp.bfloat16
    decoding = choose_decoding(decoding, e.model, dtype=dtype, device=devices[0], log=log)
    transformer = Transformer(e.model, dtype, decoding=decoding)
    mesh = make_mesh(Mesh(tensor=tensor), rows=0, devices=devices)
    with jax.set_mesh(mesh):
        shapes = transformer.shapes()
        stored = jax.jit(functools.partial(programs.unstack, transformer)).lower(_replicated(mesh, shapes)).compile()
        params = jax.tree.map(
            lambda shape, placed: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed),
            jax.eval_shape(functools.partial(programs.unstack, transformer), shapes),
            stored.output_shardings,
        )
        empty = jax.jit(functools.partial(programs.empty, transformer, rows, length, 1)).lower().compile()
        cache = jax.tree.map(
            lambda shape, placed: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed),
            jax.eval_shape(lambda: transformer.empty_cache(rows, length, write=1)),
            empty.output_shardings,
        )
        number = jax.ShapeDtypeStruct((rows,), jnp.int32)
        running = programs.DecodeState(number, number, number, jax.ShapeDtypeStruct((rows, 2), jnp.int32))
        sampled = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, pack([(SamplingParams(), 0)] * rows)))
        decode = jax.jit(
            functools.partial(programs.decode, transformer),
            donate_argnums=(1, 2),
            static_argnames=("level", "top", "return_support"),
        )
        forced = jax.ShapeDtypeStruct((STEPS, rows), jnp.int32)
        arguments = _replicated(mesh, (running, sampled, forced))
        static = {"level": SamplingParams().level, "top": False, "return_support": False}
        return decode.lower(params, cache, None, *arguments, **static)


def fit_decoding(e: Experiment, topology: Topology, log: Any) -> dict[str, Any]:
    """Compiles decoding with `ROWS` rows per chip; returns the bytes needed per device and whether they fit."""
    rows = ROWS * topology.chips
    result: dict[str, Any] = {"rows": rows, "length": e.data.row_length}
    try:
        m = lower_decode(e, topology, rows).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        log(f"{topology.name}: decoding {rows} rows of {e.data.row_length} tokens does not fit")
        return result | {"fits": False}
    needed = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    fits = needed <= topology.chip.memory
    log(
        f"{topology.name}: decoding {rows} rows of {e.data.row_length} tokens {'fits in' if fits else 'needs'} "
        f"{needed / GiB:.2f} GiB of {topology.chip.memory / GiB:.2f}"
    )
    return result | {"fits": fits, "bytes_per_device": int(needed)}


def _replicated(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Adds a sharding to shapes that replicates them on every device."""
    replicated = sharding.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), tree)
