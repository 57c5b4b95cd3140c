"""Compiles the engine's decoding steps ahead of time for absent hardware."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxchat import compilation, sharding
from jaxchat.decode import programs
from jaxchat.decode.sampling import SamplingParams, pack
from jaxchat.devices import compute_dtype
from jaxchat.experiment import Experiment
from jaxchat.launcher import log
from jaxchat.model.backends import choose_decoding
from jaxchat.model.transformer import Transformer
from jaxchat.planning.chips import GiB, Topology
from jaxchat.sharding import Mesh, make_mesh

ROWS, STEPS = 64, 8  # Rows per chip, as in RL sampling, and decoding steps per dispatch.


def lower_decode(e: Experiment, topology: Topology, rows: int) -> Any:
    """Lowers the engine's decoding steps for `rows` rows of the experiment's length on all chips.

    Sampling is at temperature 1, with the compute type and the attention backend of the chips.
    """
    chips, length = topology.devices(), e.data.row_length
    dtype = compute_dtype(e.dtype, chips[0])
    decoding = choose_decoding("auto", e.model, dtype=dtype, device=chips[0], log=log)
    transformer = Transformer(e.model, dtype, decoding=decoding)
    mesh = make_mesh(Mesh(), rows=0, devices=chips)
    with jax.set_mesh(mesh):
        params = _results(programs.unstack.lower(transformer, _replicated(mesh, transformer.shapes())))
        cache = _results(programs.empty.lower(transformer, rows, length, 1))
        number = jax.ShapeDtypeStruct((rows,), jnp.int32)
        running = programs.DecodeState(number, number, number, jax.ShapeDtypeStruct((rows, programs.STOPS), jnp.int32))
        sampled = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, pack([(SamplingParams(), 0)] * rows)))
        forced = jax.ShapeDtypeStruct((STEPS, rows), jnp.int32)
        arguments = _replicated(mesh, (running, sampled, forced))
        static = {"level": SamplingParams().level, "return_support": False}
        return programs.decode.lower(transformer, params, cache, None, *arguments, **static)


def fit_decoding(e: Experiment, topology: Topology, log: Any) -> dict[str, Any]:
    """Compiles decoding with `ROWS` rows per chip; returns the bytes needed per device and whether they fit."""
    rows = ROWS * topology.chips
    result: dict[str, Any] = {"rows": rows, "length": e.data.row_length}
    try:
        needed = compilation.step_bytes(lower_decode(e, topology, rows).compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        log(f"{topology.name}: decoding {rows} rows of {e.data.row_length} tokens does not fit")
        return result | {"fits": False}
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


def _results(lowered: Any) -> Any:
    """The shapes of a program's results, with the shardings that the compiler chooses."""
    placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(placed, lowered.out_info, lowered.compile().output_shardings)
