"""Initializers, activations, look-ups in embedding tables, and dropout."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat import sharding

Initializer = Callable[..., jax.Array]
Init = Literal["uniform", "normal", "zeros"]
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


def look_up(table: jax.Array, tokens_BT: jax.Array, axes: tuple[str, ...], dtype: Any) -> jax.Array:
    """The table's row for each token, (B, T, ...), in `dtype`; the gradient is accumulated in at least float32.

    Under a mesh the table, with logical `axes`, is first gathered in `dtype`. In the backward pass each batch shard
    accumulates its own gradient, and the sum is scattered. Left to the partitioner, every device would gather all
    devices' activations.
    """
    rows, table_dtype = table.shape[0], table.dtype
    gathered = tuple(None if name in ("embed", "tokens") else name for name in axes)

    @jax.custom_vjp
    def find(table: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        if sharding.device_count() == 1:
            return table[tokens_BT].astype(dtype)
        return sharding.constrain(table.astype(dtype), gathered)[tokens_BT]

    def backward(tokens_BT: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
        shards = sharding.batch_shards() if len(tokens_BT) % sharding.batch_shards() == 0 else 1
        wide = jnp.promote_types(table_dtype, jnp.float32)
        tokens_SN = tokens_BT.reshape(shards, -1)
        g = g.reshape(*tokens_SN.shape, *g.shape[2:]).astype(wide)
        added = jax.vmap(lambda tokens_N, g: jnp.zeros((rows, *g.shape[1:]), wide).at[tokens_N].add(g))(tokens_SN, g)
        total = added[0] if shards == 1 else sharding.add_shards(added, axes)
        return total.astype(table_dtype), None

    find.defvjp(lambda table, tokens_BT: (find(table, tokens_BT), tokens_BT), backward)
    return find(table, tokens_BT)


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
    return uniform_between(-math.sqrt(3.0) * std, math.sqrt(3.0) * std)


def uniform_between(low: float, high: float) -> Initializer:
    """Uniform between two numbers."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, low, high)

    return init


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share `rate` of its elements zero and the others divided by 1 - rate, so that its mean is unchanged.

    Without a key, which only training has, or at rate 0 it is x (arXiv:1207.0580).
    """
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def check_dropout(rate: float) -> None:
    """Raises ValueError unless `rate` is a share below 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout={rate} must be at least 0 and below 1")
