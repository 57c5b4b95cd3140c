"""Matrix products in eight bits with dynamic scales.

An eight-bit product is one `dot_general` of eight-bit operands, for hardware with such units; elsewhere XLA widens the
operands first, with the same result. Scales multiply the output. Parameters stay float32.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

# Bits of a float32: all but the sign, the exponent, and 2^-100, the smallest maximum that a scale is computed for.
MAGNITUDE, EXPONENT, LEAST = 0x7FFFFFFF, 0x7F800000, (127 - 100) << 23

Pair = tuple[Any, Any]


class Formats(NamedTuple):
    """Types of the left and right operand of a layer's three products; None is the compute type.

    `by_row`: one scale per row and column instead of one per matrix.
    """

    forward: Pair
    input_gradient: Pair
    weight_gradient: Pair | None
    by_row: bool


@dataclass(frozen=True)
class Int8:
    """Products in int8. Each row of the left operand and column of the right one is scaled to a maximum of 127.

    Attributes:
        weight_gradient: also compute weight gradients in int8. They are sums over tokens, so a channel's largest token
            sets the scale, and the other tokens lose precision (arXiv:2304.13013).
    """

    weight_gradient: bool = False

    @property
    def formats(self) -> Formats:
        whole = (jnp.int8, jnp.int8)
        return Formats(whole, whole, whole if self.weight_gradient else None, True)


@dataclass(frozen=True)
class Float8:
    """Products in eight-bit floats (arXiv:2209.05433): e4m3, but e5m2 for gradients of outputs.

    Scales are powers of two, so scaling does not round.

    Attributes:
        scaling: "tensor" uses one scale per matrix, like nanochat; "row" uses one per row of the left operand and
            column of the right one, so that no token's scale depends on another token.
    """

    scaling: Literal["tensor", "row"] = "tensor"

    @property
    def formats(self) -> Formats:
        fine, wide = jnp.float8_e4m3fn, jnp.float8_e5m2
        return Formats((fine, fine), (wide, fine), (fine, wide), self.scaling == "row")


Matmul = Int8 | Float8 | None  # None is the compute type.


class Scaled(NamedTuple):
    """A quantized matrix: values times a broadcast scale."""

    values: jax.Array
    scale: jax.Array


def quantize(a: jax.Array, dtype: Any, axis: int | None) -> Scaled:
    """Scales `a` by its absolute maximum along `axis` (None: of all) and rounds it to an eight-bit `dtype`.

    Integers are scaled to the full range, floats by a power of two. Rounding is to nearest, ties to even.
    """
    wide = a.astype(jnp.float32)
    # Bit patterns order like magnitudes and keep NaN, which a maximum of floats may drop (on a CPU it does).
    bits = jax.lax.bitcast_convert_type(wide, jnp.int32) & MAGNITUDE
    bits = jnp.maximum(jnp.max(bits, axis=axis, keepdims=True), LEAST)
    largest = jax.lax.bitcast_convert_type(bits, jnp.float32)
    if jnp.issubdtype(dtype, jnp.integer):
        most = jnp.iinfo(dtype).max
        return Scaled(jnp.round(wide * (most / largest)).astype(dtype), largest / most)
    bits = jax.lax.bitcast_convert_type(float(jnp.finfo(dtype).max) / largest, jnp.int32)
    rate = jax.lax.bitcast_convert_type(bits & EXPONENT, jnp.float32)
    return Scaled((wide * rate).astype(dtype), 1 / rate)


def _multiply(a: jax.Array, b: jax.Array, pair: Pair | None, *, by_row: bool) -> jax.Array:
    """The matrix product a b in float32, with operands rounded to the two types of `pair`."""
    if pair is None:
        return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
    left, right = quantize(a, pair[0], 1 if by_row else None), quantize(b, pair[1], 0 if by_row else None)
    sums = jnp.int32 if jnp.issubdtype(pair[0], jnp.integer) else jnp.float32
    y = jax.lax.dot(left.values, right.values, preferred_element_type=sums)
    return y.astype(jnp.float32) * left.scale * right.scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_product(matmul: Any, x_NK: jax.Array, w_KF: jax.Array) -> jax.Array:
    """x w, (N, F) in x's type, and its gradients, with operands rounded to the types of `matmul.formats`."""
    return _forward(matmul, x_NK, w_KF)[0]


def _forward(matmul: Any, x_NK: jax.Array, w_KF: jax.Array) -> tuple[jax.Array, Pair]:
    formats = matmul.formats
    return _multiply(x_NK, w_KF, formats.forward, by_row=formats.by_row).astype(x_NK.dtype), (x_NK, w_KF)


def _backward(matmul: Any, saved: Pair, g_NF: jax.Array) -> Pair:
    """Straight-through estimator: the gradient ignores rounding (Bengio et al. 2013, arXiv:1308.3432)."""
    x_NK, w_KF = saved
    formats = matmul.formats
    dx_NK = _multiply(g_NF, w_KF.T, formats.input_gradient, by_row=formats.by_row)
    dw_KF = _multiply(x_NK.T, g_NF, formats.weight_gradient, by_row=formats.by_row)
    return dx_NK.astype(x_NK.dtype), dw_KF.astype(w_KF.dtype)


quantized_product.defvjp(_forward, _backward)
