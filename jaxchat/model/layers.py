"""Parameters with logical axes, initial values, and normalisation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

Initializer = Callable[..., jax.Array]
Init = Literal["uniform", "normal", "zeros"]


@dataclass(frozen=True)
class RMSNorm:
    """Root mean square normalisation without a weight (arXiv:1910.07467), computed in float32."""

    eps: float = 1e-6


def rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32 inside and in x's type outside."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def param(module: nn.Module, name: str, axes: tuple[str, ...], shape: tuple[int, ...], init: Initializer) -> jax.Array:
    """A float32 parameter whose logical axes stand beside its shape; sharding and optimizer groups read the axes."""
    if len(axes) != len(shape):
        raise ValueError(f"parameter {name} has {len(axes)} axes and {len(shape)} dimensions")
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape)
    return value


def initializer(kind: Init, fan_in: int, fan_out: int, scale: float = 1.0) -> Initializer:
    """Initial values of a matrix.

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
