"""Normalisation; `NORMS` maps a configuration type to its module."""

import functools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat.model.part import Static, param

Gain = Literal["none", "w", "1+w"]  # What a normalised channel is multiplied by: nothing, w (initially 1), 1 + w (0).


@dataclass(frozen=True)
class RMSNorm:
    """Root mean square normalisation (arXiv:1910.07467), x / sqrt(mean(x^2) + eps), computed in float32."""

    eps: float = 1e-6  # Added to the mean square.
    gain: Gain = "none"  # Learned factor of each channel: none, w as in Llama, 1 + w as in Gemma.
    bias: bool = False  # Learned number added to each channel.


@dataclass(frozen=True)
class LayerNorm:
    """Layer normalisation (arXiv:1607.06450), (x - mean) / sqrt(variance + eps), computed in float32."""

    eps: float = 1e-5  # Added to the variance.
    gain: Gain = "w"  # Learned factor of each channel: none, w, 1 + w.
    bias: bool = True  # Learned number added to each channel.


class RMSNormLayer(nn.Module):
    """Normalises over the last axes of x, whose logical names are `axes`. Gain and bias are applied in float32."""

    config: Any
    static: Static
    axes: tuple[str, ...] = ("width",)
    centred: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, over = self.config, tuple(range(-len(self.axes), 0))
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.centred:
            y = y - jnp.mean(y, axis=over, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=over, keepdims=True) + c.eps)
        if c.gain != "none":
            gain = self._vector("gain", x, nn.initializers.ones if c.gain == "w" else nn.initializers.zeros)
            y = y * (gain if c.gain == "w" else 1 + gain)
        if c.bias:
            y = y + self._vector("bias", x, nn.initializers.zeros)
        return y.astype(x.dtype)

    def _vector(self, name: str, x: jax.Array, init: Any) -> jax.Array:
        shape = x.shape[-len(self.axes) :]
        vector = param(self, name, self.axes, shape, init, group="scalars")
        return vector.reshape((1,) * (x.ndim - len(shape)) + shape)


class LayerNormLayer(RMSNormLayer):
    centred: ClassVar[bool] = True


NORMS: dict[type, Any] = {RMSNorm: RMSNormLayer, LayerNorm: LayerNormLayer}
if TYPE_CHECKING:
    Norm = Any
else:
    Norm = functools.reduce(operator.or_, NORMS)


def normalise(config: Norm, static: Static, params: Any, x: jax.Array) -> jax.Array:
    """Applies a norm outside of a Flax module; `params` are the norm's parameters."""
    y: jax.Array = NORMS[type(config)](config, static).apply({"params": params}, x)
    return y
