"""Attention as dense matrix products, and the one mask rule.

The rule covers training, packing, padding, windows and decoding: a query at position q sees a key at position k of the
same segment if 0 <= k <= q and, with a window W, k > q - 1 - W (so W + 1 keys).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxchat.model.layers import dropout
from jaxchat.model.products import sum_of_products

Bias = Callable[[jax.Array, jax.Array], jax.Array]  # Of query and key positions to scores (B or 1, H, T, S).
MASKED = -1e30  # Finite, so that the softmax of a query without visible keys is finite.


class Scores(NamedTuple):
    """What attention does with the scores s besides the softmax over the keys; None and 0 leave it out.

    softcap * tanh(s / softcap) (Gemma 2, arXiv:2408.00118), then + bias; a sink per head takes weight like one more key
    with this score and no value (arXiv:2309.17453; gpt-oss). A share `dropout` of the weights is dropped if there is a
    `key`.
    """

    bias: Bias | None = None
    softcap: float | None = None
    sinks_H: jax.Array | None = None
    dropout: float = 0.0
    key: jax.Array | None = None


PLAIN = Scores()


def visible(
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None = None,
    k_segments_BS: jax.Array | None = None,
    *,
    window: int | None = None,
) -> jax.Array:
    """The mask rule: bool (B, T, S), true where a query sees a key."""
    q, k = q_positions_BT[:, :, None], k_positions_BS[:, None, :]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen &= k > q - 1 - window
    if q_segments_BT is not None and k_segments_BS is not None:
        seen &= q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    return seen


def attend(
    q_BTHD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    seen_BTS: jax.Array,
    scores: Scores | None = None,
    q_positions_BT: jax.Array | None = None,
    k_positions_BS: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the visible keys, with `scores` of positions; scores and softmax in float32.

    Keys and values have heads before slots, the layout of a cache. Returns (B, T, H, the size of v's heads).
    """
    B, T, H, D = q_BTHD.shape
    K, G = k_BKSD.shape[1], H // k_BKSD.shape[1]
    q_BKRD = (q_BTHD * D**-0.5).reshape(B, T, K, G, D).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    if scores is None:
        o_BKRD = _attend_heads(q_BKRD, k_BKSD, v_BKSD, seen_BTS)
    else:
        bias_BKRS = None
        if scores.bias is not None:
            bias_BHTS = scores.bias(q_positions_BT, k_positions_BS)  # type: ignore[arg-type]
            bias_BKRS = bias_BHTS.reshape(len(bias_BHTS), K, G * T, -1)
        o_BKRD = _attend_forward(q_BKRD, k_BKSD, v_BKSD, seen_BTS, scores, bias_BKRS)[0]
    return o_BKRD.reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


def weights(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    seen_BTS: jax.Array,
    bias_BHTS: jax.Array | None = None,
    softcap: Any = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """The weights (B, H, T, S) with which `attend` sums v, in float32; only inspection needs them."""
    k_BSHD = jnp.repeat(k_BSKD, q_BTHD.shape[2] // k_BSKD.shape[2], axis=2)
    wide = jnp.promote_types(q_BTHD.dtype, jnp.float32)
    s_BHTS = jnp.einsum("BTHD,BSHD->BHTS", q_BTHD * q_BTHD.shape[-1] ** -0.5, k_BSHD, preferred_element_type=wide)
    s_BHTS = s_BHTS if softcap is None else softcap * jnp.tanh(s_BHTS / softcap)
    s_BHTS = s_BHTS if bias_BHTS is None else s_BHTS + bias_BHTS
    s_BHTS = jnp.where(seen_BTS[:, None], s_BHTS, MASKED)
    if sinks_H is None:
        return jax.nn.softmax(s_BHTS, axis=-1)
    sinks_BHT1 = jnp.broadcast_to(sinks_H[None, :, None, None].astype(wide), (*s_BHTS.shape[:3], 1))
    return jax.nn.softmax(jnp.concatenate([s_BHTS, sinks_BHT1], axis=-1), axis=-1)[..., :-1]


@jax.custom_vjp
def _attend_heads(q_BKRD: jax.Array, k_BKSD: jax.Array, v_BKSD: jax.Array, seen_BTS: jax.Array) -> jax.Array:
    """Attention with heads first and R = G * T queries per kv head: every product is one batched matrix product.

    The gradient is written by hand, because autodiff takes twice as long on a CPU.
    """
    return _attend_forward(q_BKRD, k_BKSD, v_BKSD, seen_BTS)[0]


def _attend_forward(
    q_BKRD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    seen_BTS: jax.Array,
    scores: Scores = PLAIN,
    bias_BKRS: jax.Array | None = None,
) -> Any:
    """The softmax is normalised after the product with v, which has fewer columns than there are keys."""
    B, K, R, _ = q_BKRD.shape
    T, S = seen_BTS.shape[1:]
    s_BKRS = _product(q_BKRD, k_BKSD, 3, 3)
    if scores.softcap is not None:
        s_BKRS = scores.softcap * jnp.tanh(s_BKRS / scores.softcap)
    s_BKRS = s_BKRS if bias_BKRS is None else s_BKRS + bias_BKRS
    hide_BTS = jnp.where(seen_BTS, 0, MASKED).astype(s_BKRS.dtype)
    s_BKRS = (s_BKRS.reshape(B, K, R // T, T, S) + hide_BTS[:, None, None]).reshape(B, K, R, S)
    top_BKR1, sink_1KR1 = jnp.max(s_BKRS, axis=-1, keepdims=True), None
    if scores.sinks_H is not None:
        sink_1KR1 = jnp.repeat(scores.sinks_H.astype(s_BKRS.dtype), T).reshape(1, K, R, 1)
        top_BKR1 = jnp.maximum(top_BKR1, sink_1KR1)
    top_BKR1 = jax.lax.stop_gradient(top_BKR1)
    e_BKRS = jnp.exp(s_BKRS - top_BKR1)
    sum_BKR1 = jnp.sum(e_BKRS, axis=-1, keepdims=True)
    sum_BKR1 = sum_BKR1 if sink_1KR1 is None else sum_BKR1 + jnp.exp(sink_1KR1 - top_BKR1)
    e_BKRS = dropout(e_BKRS.astype(v_BKSD.dtype), scores.dropout, scores.key)
    o_BKRD = (_product(e_BKRS, v_BKSD, 3, 2) / sum_BKR1).astype(v_BKSD.dtype)
    return o_BKRD, (q_BKRD, k_BKSD, v_BKSD, e_BKRS, sum_BKR1, o_BKRD)


def _attend_backward(saved: Any, do_BKRD: jax.Array) -> Any:
    q_BKRD, k_BKSD, v_BKSD, e_BKRS, sum_BKR1, o_BKRD = saved
    do_BKRD = (do_BKRD / sum_BKR1).astype(do_BKRD.dtype)
    dv_BKSD = sum_of_products(e_BKRS, do_BKRD, sum_BKR1.dtype).astype(v_BKSD.dtype)
    dp_BKRS = _product(do_BKRD, v_BKSD, 3, 3)
    mean_BKR1 = jnp.sum(do_BKRD.astype(dp_BKRS.dtype) * o_BKRD, axis=-1, keepdims=True)
    ds_BKRS = (e_BKRS * (dp_BKRS - mean_BKR1)).astype(q_BKRD.dtype)
    dq_BKRD = _product(ds_BKRS, k_BKSD, 3, 2).astype(q_BKRD.dtype)
    dk_BKSD = sum_of_products(ds_BKRS, q_BKRD, sum_BKR1.dtype).astype(k_BKSD.dtype)
    return dq_BKRD, dk_BKSD, dv_BKSD, None


_attend_heads.defvjp(_attend_forward, _attend_backward)


def _product(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """Contracts axis i of a with axis j of b, batched over rows and kv heads, accumulated in at least float32."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((0, 1), (0, 1))), preferred_element_type=wide)


def attend_row(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    *,
    window: int | None,
    scores: Scores | None = None,
) -> jax.Array:
    """Self-attention of whole rows in blocks of queries, skipping keys that no query of the block can see.

    A block reads the keys up to its own end and, with a window, from the start of its first query's window: tokens of a
    segment are in order, so differences of row indices equal differences of positions.
    """
    T = q_BTHD.shape[1]
    size = max(128, -(-T // 4))
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        first = 0 if window is None else max(0, start - window)
        rows, keys = slice(start, end), slice(first, end)
        seen_BTS = visible(
            positions_BT[:, rows],
            positions_BT[:, keys],
            None if segments_BT is None else segments_BT[:, rows],
            None if segments_BT is None else segments_BT[:, keys],
            window=window,
        )
        own = scores
        if own is not None and own.key is not None:
            own = own._replace(key=jax.random.fold_in(own.key, start))
        k_BKSD, v_BKSD = (x_BTKD[:, keys].swapaxes(1, 2) for x_BTKD in (k_BTKD, v_BTKD))
        where = positions_BT[:, rows], positions_BT[:, keys]
        blocks.append(attend(q_BTHD[:, rows], k_BKSD, v_BKSD, seen_BTS, own, *where))
    return jnp.concatenate(blocks, axis=1)
