"""Attention of new tokens to a cache: the backends of `DECODING`, all with the mask rule of `dense.visible`.

A backend takes q (B, T, H, D), the cache with those tokens written, their positions (B, T) with -1 for padding, the
rows' lengths (B,), and a window or None. It returns (B, T, H, D); results for padding are finite and meaningless.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxchat import sharding
from jaxchat.model.cache import KVCache, slot_positions
from jaxchat.model.dense import MASKED, Scores, attend, visible

BLOCK_BYTES = 1 << 20  # Bytes of keys per kernel step; values take as many, and both are double-buffered.
MOST_SLOTS = 512  # Maximum number of slots per block.
SUBLANES, LANES = 16, 128  # A TPU's bfloat16 tile: block sides are multiples of it, or the array's whole side.

Backend = Callable[..., jax.Array]


def xla(
    q_BTHD: jax.Array,
    cache: KVCache,
    positions_BT: jax.Array,
    length_B: jax.Array,
    window: int | None,
    *,
    scores: Scores | None = None,
) -> jax.Array:
    """Dense products with the whole cache, on any device; `length_B` is the number of positions written."""
    slot_BS = slot_positions(length_B, cache.k_BKSD.shape[2])
    seen_BTS = visible(positions_BT, slot_BS, window=window)
    k_BKSD, v_BKSD = (x_BKSD.astype(q_BTHD.dtype) for x_BKSD in cache)
    return attend(q_BTHD, k_BKSD, v_BKSD, seen_BTS, scores, positions_BT, slot_BS)


def filled(
    q_BTHD: jax.Array,
    cache: KVCache,
    positions_BT: jax.Array,
    length_B: jax.Array,
    window: int | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """A Pallas kernel for TPUs that reads each row's cache only as far as it is filled; `interpret` runs it anywhere.

    Calls with several tokens per row use `xla`. Otherwise a row's position determines what its cache holds, so
    `length_B` is not read. Rows of padding return zeros.
    """
    B, T, H, D = q_BTHD.shape
    if T > 1:
        return xla(q_BTHD, cache, positions_BT, length_B, window)
    K = cache.k_BKSD.shape[1]
    attend = functools.partial(_filled, window=window, interpret=interpret)
    rows = ("batch", "kv_heads", None, None)
    q_BKGD = (q_BTHD * D**-0.5).reshape(B, K, H // K, D)
    arrays = [q_BKGD, *(x_BKSD.astype(q_BTHD.dtype) for x_BKSD in cache), positions_BT[:, 0]]
    return sharding.on_each_device(attend, arrays, [rows, rows, rows, ("batch",)]).reshape(B, 1, H, D)


def _filled(
    q_BKGD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    position_B: jax.Array,
    *,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    """The TPU kernel for one scaled query per row and head. A grid step reads one block of slots for all kv heads.

    Heads of fewer than 128 channels would fill TPU tiles only in part. There slots lie along the lanes, and the kernel
    takes (K, D, S), which avoids a copy of the cache.
    """
    B, K, G, D = q_BKGD.shape
    S = k_BKSD.shape[2]
    across = D < LANES <= S
    block = block_slots(S, K * D * k_BKSD.dtype.itemsize, LANES if across else SUBLANES)
    shape, keys, values = (None, K, block, D), k_BKSD, v_BKSD
    if across:
        shape, keys, values = (None, K, D, block), k_BKSD.swapaxes(2, 3), v_BKSD.swapaxes(2, 3)

    def row_index(b: Any, i: Any, position_B: Any) -> tuple[Any, ...]:
        return b, 0, 0, 0

    def slot_index(b: Any, i: Any, position_B: Any) -> tuple[Any, ...]:
        # A step with the block index of the previous step fetches nothing.
        last = jax.lax.div(jnp.minimum(jnp.maximum(position_B[b], 0), S - 1), block)
        i = jnp.minimum(i, last)
        return (b, 0, 0, i) if across else (b, 0, i, 0)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(B, pl.cdiv(S, block)),
        in_specs=[
            pl.BlockSpec((None, K, G, D), row_index),
            pl.BlockSpec(shape, slot_index),
            pl.BlockSpec(shape, slot_index),
        ],
        out_specs=pl.BlockSpec((None, K, G, D), row_index),
        scratch_shapes=[pltpu.VMEM((K, G, width), jnp.float32) for width in (1, 1, D)],
    )
    call = pl.pallas_call(
        functools.partial(_block, S=S, window=window, axis=2 if across else 1),
        out_shape=jax.ShapeDtypeStruct(q_BKGD.shape, q_BKGD.dtype),
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="attend_filled",
    )
    return call(position_B, q_BKGD, keys, values)


def block_slots(slots: int, slot_bytes: int, multiple: int) -> int:
    """Number of slots per kernel step: small enough for a core's memory, in blocks as equal as tiles allow."""
    most = max(multiple, min(MOST_SLOTS, BLOCK_BYTES // slot_bytes) // multiple * multiple)
    if slots <= most:
        return slots
    return pl.cdiv(pl.cdiv(slots, pl.cdiv(slots, most)), multiple) * multiple


def _block(
    position_B: Any,
    q_KGD: Any,
    keys: Any,
    values: Any,
    o_KGD: Any,
    top_KG1: Any,
    total_KG1: Any,
    mixed_KGD: Any,
    *,
    S: int,
    window: int | None,
    axis: int,
) -> None:
    """One step of the online softmax over a row's slots (arXiv:1805.02867): updates its maximum, sum and mixed values.

    Slot s holds the token (position - s) mod S positions back, which is visible if it is written and in the window.
    Slots lie along `axis` of keys and values: (K, S, D) or (K, D, S).
    """
    i, position, block = pl.program_id(1), position_B[pl.program_id(0)], keys.shape[axis]

    @pl.when(i == 0)
    def _start() -> None:
        top_KG1[...] = jnp.full(top_KG1.shape, MASKED, jnp.float32)
        total_KG1[...] = jnp.zeros(total_KG1.shape, jnp.float32)
        mixed_KGD[...] = jnp.zeros(mixed_KGD.shape, jnp.float32)

    @pl.when(i * block < jnp.minimum(position + 1, S))
    def _add() -> None:
        def seen(shape: tuple[int, ...], axis: int) -> jax.Array:
            slot = i * block + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            back = jax.lax.rem(position, S) - slot
            back = jnp.where(back < 0, back + S, back)
            most = position if window is None else jnp.minimum(position, window)
            return (back <= most) & (slot < S)

        s_KGS = _product(q_KGD[...], keys[...], 3 - axis)
        seen_KGS = seen(s_KGS.shape, 2)
        s_KGS = jnp.where(seen_KGS, s_KGS, MASKED)
        before_KG1 = top_KG1[...]
        after_KG1 = jnp.maximum(before_KG1, jnp.max(s_KGS, axis=2, keepdims=True))
        e_KGS = jnp.where(seen_KGS, jnp.exp(s_KGS - after_KG1), 0)
        rescale_KG1 = jnp.exp(before_KG1 - after_KG1)
        # Unwritten slots may hold NaN, and 0 * NaN is NaN.
        v = jnp.where(seen(values.shape, axis), values[...], 0)
        top_KG1[...] = after_KG1
        total_KG1[...] = rescale_KG1 * total_KG1[...] + jnp.sum(e_KGS, axis=2, keepdims=True)
        mixed_KGD[...] = rescale_KG1 * mixed_KGD[...] + _product(e_KGS.astype(v.dtype), v, axis)

    @pl.when(i == pl.num_programs(1) - 1)
    def _finish() -> None:
        total = total_KG1[...]
        o_KGD[...] = (mixed_KGD[...] / jnp.where(total == 0, 1, total)).astype(o_KGD.dtype)


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Contracts the last axis of a with `axis` of b, batched over kv heads, accumulated in float32."""
    return jax.lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)


DECODING: Mapping[str, Backend] = {
    "xla": xla,
    "filled": filled,
    "filled_interpreted": functools.partial(filled, interpret=True),
}
