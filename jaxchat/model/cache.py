"""The key and value cache: a ring of slots per row, as a value that goes in and comes out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Keys and values by slot; `positions_BS` says which position a slot holds, -1 where it is empty."""

    k_BSKD: jax.Array
    v_BSKD: jax.Array
    positions_BS: jax.Array


def empty(
    batch: int, length: int, *, window: int | None, write: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> KVCache:
    """An empty cache for `length` positions.

    A windowed layer keeps a ring of window + 1 + `write` slots, `write` being the most tokens written by one call, so
    that the first of them still finds every key of its window.
    """
    slots = length if window is None else min(length, window + 1 + write)
    shape = (batch, slots, kv_heads, head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full((batch, slots), -1, jnp.int32))


def write(cache: KVCache, k_BTKD: jax.Array, v_BTKD: jax.Array, positions_BT: jax.Array) -> KVCache:
    """Writes the keys and values of each token at its position's slot; a position of -1 (padding) is not written."""
    slots = cache.positions_BS.shape[1]
    rows = jnp.arange(positions_BT.shape[0])[:, None]
    slot_BT = jnp.where(positions_BT >= 0, positions_BT % slots, slots)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows, slot_BT].set(new.astype(old.dtype), mode="drop")

    return KVCache(put(cache.k_BSKD, k_BTKD), put(cache.v_BSKD, v_BTKD), put(cache.positions_BS, positions_BT))
