"""Normalisation; `NORMS` maps a configuration type to its module."""

import functools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat.model.part import Static


@dataclass(frozen=True)
class RMSNorm:
    """Root mean square normalisation without a weight (arXiv:1910.07467), computed in float32."""

    eps: float = 1e-6  # Added to the mean square.


def rms_norm(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in at least float32 and returned in x's type."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNormLayer(nn.Module):
    config: RMSNorm
    static: Static

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.config.eps)


NORMS: dict[type, Any] = {RMSNorm: RMSNormLayer}
if TYPE_CHECKING:
    Norm = Any
else:
    Norm = functools.reduce(operator.or_, NORMS)


def normalise(config: Norm, static: Static, params: Any, x: jax.Array) -> jax.Array:
    """Applies a norm outside of a Flax module; `params` are the norm's parameters."""
    y: jax.Array = NORMS[type(config)](config, static).apply({"params": params}, x)
    return y
