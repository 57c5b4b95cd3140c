"""Initializers, and look-ups in embedding tables."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat import sharding

Initializer = Callable[..., jax.Array]
Init = Literal["uniform", "normal", "zeros"]


class _LookUp(NamedTuple):
    """Static facts of a look-up: the table's logical axes, number of rows and type, and the type of the result."""

    axes: tuple[str, ...]
    rows: int
    table_dtype: Any
    dtype: Any


def look_up(table: jax.Array, tokens_BT: jax.Array, axes: tuple[str, ...], dtype: Any) -> jax.Array:
    """The table's row for each token, (B, T, ...), in `dtype`; the gradient is accumulated in at least float32.

    Under a mesh the table is first gathered in `dtype`. In the backward pass each batch shard accumulates its own
    gradient, and the sum is scattered. Left to the partitioner, every device would gather all devices' activations.
    """
    facts = _LookUp(axes, table.shape[0], jnp.dtype(table.dtype), jnp.dtype(dtype))
    return _look_up(facts, table, tokens_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(facts: _LookUp, table: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    if sharding.device_count() == 1:
        return table[tokens_BT].astype(facts.dtype)
    return sharding.constrain(table.astype(facts.dtype), _gathered(facts.axes))[tokens_BT]


def _look_up_forward(facts: _LookUp, table: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _look_up(facts, table, tokens_BT), tokens_BT


def _look_up_backward(facts: _LookUp, tokens_BT: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    shards = sharding.batch_shards() if len(tokens_BT) % sharding.batch_shards() == 0 else 1
    wide = jnp.promote_types(facts.table_dtype, jnp.float32)
    tokens_SN = tokens_BT.reshape(shards, -1)
    g = g.reshape(*tokens_SN.shape, *g.shape[2:]).astype(wide)
    added = jax.vmap(lambda tokens_N, g: jnp.zeros((facts.rows, *g.shape[1:]), wide).at[tokens_N].add(g))(tokens_SN, g)
    if shards == 1:
        return added[0].astype(facts.table_dtype), None
    return sharding.add_shards(added, facts.axes).astype(facts.table_dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _gathered(axes: tuple[str, ...]) -> tuple[str | None, ...]:
    """Axes of a table that every batch shard holds whole."""
    return tuple(None if name in ("embed", "tokens") else name for name in axes)


def initializer(kind: Init, fan_in: int, fan_out: int, scale: float = 1.0) -> Initializer:
    """The initializer of a weight matrix.

    `uniform` has standard deviation scale / sqrt(fan_in) (nanochat since 2026); `normal` is
    scale / sqrt(fan_in) * min(1, sqrt(fan_out / fan_in)) (nanochat of October 2025, after arXiv:2310.17813).
    """
    if kind == "zeros":
        return nn.initializers.zeros_init()
    std = scale / math.sqrt(fan_in)
    if kind == "uniform":
        return centred_uniform(std)
    return nn.initializers.normal(std * min(1.0, math.sqrt(fan_out / fan_in)))


def centred_uniform(std: float) -> Initializer:
    """Uniform around zero with the given standard deviation."""
    bound = math.sqrt(3.0) * std

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def uniform_between(low: float, high: float) -> Initializer:
    """Uniform between two numbers."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, low, high)

    return init
