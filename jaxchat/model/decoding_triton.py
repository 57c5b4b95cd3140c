"""Attention of one new token per row to its cache on GPUs, in Triton, with slots split over many programs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxchat.model.dense import MASKED

PART = 256  # Slots per program: small, so that one row occupies several of a GPU's cores.
BLOCK = 64  # Slots that a program reads at a time.
LEAST_QUERIES = 16  # Minimum rows of a product on a GPU's matrix units.


def attend(
    q_BKGD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    position_B: jax.Array,
    *,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """Attention (B, K, G, D) of one scaled query per row and head; rows of padding (position -1) return zeros.

    Each program returns the unnormalised softmax of its own slots, with its maximum score and its sum
    (arXiv:1805.02867); these are combined here.
    """
    B, K, G, D = q_BKGD.shape
    S = k_BKSD.shape[2]
    Q, N = max(LEAST_QUERIES, pl.next_power_of_2(G)), pl.cdiv(S, PART)
    q_BKQD = jnp.pad(q_BKGD, ((0, 0), (0, 0), (0, Q - G), (0, 0)))
    row = lambda b, k, n: (b, k, 0, 0)  # noqa: E731
    part = lambda *sizes: pl.BlockSpec(  # noqa: E731
        (None, None, None, *sizes), lambda b, k, n: (b, k, n, *[0] * len(sizes))
    )
    sizes = [(Q, D), (Q,), (Q,)]
    mixed_BKNQD, top_BKNQ, total_BKNQ = pl.pallas_call(
        functools.partial(_part, S=S, window=window),
        out_shape=[jax.ShapeDtypeStruct((B, K, N, *size), jnp.float32) for size in sizes],
        grid=(B, K, N),
        in_specs=[
            pl.BlockSpec((1,), lambda b, k, n: (b,)),
            pl.BlockSpec((None, None, Q, D), row),
            pl.BlockSpec((None, None, S, D), row),
            pl.BlockSpec((None, None, S, D), row),
        ],
        out_specs=[part(*size) for size in sizes],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_parts",
    )(position_B, q_BKQD, k_BKSD, v_BKSD)
    top_BK1Q = jnp.max(top_BKNQ, axis=2, keepdims=True)
    rescale_BKNQ = jnp.exp(top_BKNQ - top_BK1Q)
    total_BKQ = jnp.sum(rescale_BKNQ * total_BKNQ, axis=2)
    mixed_BKQD = jnp.sum(rescale_BKNQ[..., None] * mixed_BKNQD, axis=2)
    o_BKQD = mixed_BKQD / jnp.where(total_BKQ == 0, 1, total_BKQ)[..., None]
    return o_BKQD[:, :, :G].astype(q_BKGD.dtype)


def _part(
    position_1: Any,
    q_QD: Any,
    k_SD: Any,
    v_SD: Any,
    mixed_QD: Any,
    top_Q: Any,
    total_Q: Any,
    *,
    S: int,
    window: int | None,
) -> None:
    """One program: the online softmax over its slots; slots that are not filled are not read.

    Slot s holds the token (position - s) mod S positions back, which is visible if it is written and in the window.
    """
    position, start = position_1[0], pl.program_id(2) * PART
    most = position if window is None else jnp.minimum(position, window)
    last = jnp.minimum(jnp.minimum(position + 1, S) - start, PART)
    q = q_QD[...]
    Q, D = q.shape

    def add(i: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, mixed = carry
        first = start + i * BLOCK
        slot = first + jnp.arange(BLOCK)
        back = jax.lax.rem(position, S) - slot
        back = jnp.where(back < 0, back + S, back)
        seen = (back <= most) & (slot < S)
        rows = pl.ds(first, BLOCK)
        everywhere = jnp.broadcast_to(seen[:, None], (BLOCK, D))
        k = plt.load(k_SD.at[rows, :], mask=everywhere, other=0.0)
        v = plt.load(v_SD.at[rows, :], mask=everywhere, other=0.0)
        s = jnp.where(seen[None], _product(q, k.T), MASKED)
        after = jnp.maximum(top, jnp.max(s, axis=1))
        e = jnp.where(seen[None], jnp.exp(s - after[:, None]), 0)
        rescale = jnp.exp(top - after)
        mixed = rescale[:, None] * mixed + _product(e.astype(v.dtype), v)
        return after, rescale * total + jnp.sum(e, axis=1), mixed

    empty = jnp.full(Q, MASKED, jnp.float32), jnp.zeros(Q, jnp.float32), jnp.zeros((Q, D), jnp.float32)
    top_Q[...], total_Q[...], mixed_QD[...] = jax.lax.fori_loop(0, pl.cdiv(jnp.maximum(last, 0), BLOCK), add, empty)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
