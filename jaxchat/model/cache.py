"""The key-value cache: a ring buffer of slots per row. Functions take a cache and return the new one.

`resize` and `write` work for any NamedTuple of arrays (batch, heads, slots, size).

Position p is stored in slot p % slots, so a row's length determines which position each slot holds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
    """Keys and values by slot. Heads come before slots, the layout in which attention reads them."""

    k_BKSD: jax.Array
    v_BKSD: jax.Array

    @property
    def axes(self) -> "KVCache":
        """Logical axes, for placing the cache on a mesh."""
        return KVCache(*[("batch", "kv_heads", None, None)] * 2)  # type: ignore[arg-type]

    def resize(self, length_B: jax.Array, like: Any) -> "KVCache":
        return resize(self, length_B, like)


def ring_slots(length: int, window: int | None, write: int) -> int:
    """Number of slots for `length` positions, where one call writes up to `write` tokens.

    A windowed layer keeps window + 1 + `write`, so that the first token of a call still has every key of its window in
    the ring, even after up to `write` tokens were rolled back.
    """
    return length if window is None else min(length, window + 1 + write)


def slot_positions(length_B: jax.Array, slots: int) -> jax.Array:
    """Position in each slot, (B, S), after positions 0 to length - 1 were written; -1 for an empty slot."""
    last_B1, slot_S = length_B[:, None] - 1, jnp.arange(slots, dtype=jnp.int32)[None]
    return jnp.maximum(last_B1 - (last_B1 - slot_S) % slots, -1)


def resize(cache: Any, length_B: jax.Array, like: Any) -> Any:
    """Copies the rows into rings with the number of slots of `like`; a smaller ring drops the oldest positions."""
    old, slots = cache[0].shape[2], like[0].shape[2]
    if slots == old:
        return cache
    index_BS = jnp.maximum(slot_positions(length_B, slots), 0) % old
    return type(cache)(*(jnp.take_along_axis(x, index_BS[:, None, :, None], axis=2) for x in cache))


def write(cache: Any, positions_BT: jax.Array, *new_BTKD: jax.Array) -> Any:
    """Writes a value per token for each array to the slot of its position, except for padding (position -1)."""
    slots = cache[0].shape[2]
    rows = jnp.arange(positions_BT.shape[0])[:, None]
    slot_BT = jnp.where(positions_BT >= 0, positions_BT % slots, slots)

    def put(old_BKSD: jax.Array, new_BTKD: jax.Array) -> jax.Array:
        return old_BKSD.at[rows, :, slot_BT].set(new_BTKD.astype(old_BKSD.dtype), mode="drop")

    return type(cache)(*map(put, cache, new_BTKD))
