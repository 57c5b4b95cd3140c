"""The large matrix products of the layers: in the compute type, or in eight bits with scales made anew each time.

A product of eight-bit numbers is one `dot_general` of them, so that hardware with units for it uses these; elsewhere
XLA widens the numbers first, which gives the same result. Scales multiply what comes out. Parameters stay float32.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

# Bits of a float32: without the sign, those of the exponent, and 2^-100, the least that scales are made for.
MAGNITUDE, EXPONENT, LEAST = 0x7FFFFFFF, 0x7F800000, (127 - 100) << 23


@dataclass(frozen=True)
class Int8:
    """Products of int8, each row and column that is multiplied scaled so that its largest number is 127.

    Attributes:
        weight_gradient: whether gradients of weights are such products too. They are sums over tokens, so a channel's
            scale is set by its largest token and the others round to little (arXiv:2304.13013).
    """

    weight_gradient: bool = False


@dataclass(frozen=True)
class Float8:
    """Products of eight-bit floats (arXiv:2209.05433): e4m3, and e5m2 for gradients of outputs.

    Scales are powers of two, so they round nothing; the formats' own exponents do the rest.

    Attributes:
        scaling: "tensor" has one scale a matrix, as nanochat does, "row" one for each row and column that is
            multiplied, so that no token's scale depends on another token.
    """

    scaling: Literal["tensor", "row"] = "tensor"


Matmul = Int8 | Float8 | None  # None is the compute type.
Pair = tuple[Any, Any]


class Formats(NamedTuple):
    """The types of the left and right factor of a layer's three products; None is the compute type.

    `by_row` is whether rows and columns have scales of their own.
    """

    forward: Pair
    input_gradient: Pair
    weight_gradient: Pair | None
    by_row: bool


class Scaled(NamedTuple):
    """A matrix as values times a scale that broadcasts."""

    values: jax.Array
    scale: jax.Array


def _int8(matmul: Int8) -> Formats:
    whole = (jnp.int8, jnp.int8)
    return Formats(whole, whole, whole if matmul.weight_gradient else None, True)


def _float8(matmul: Float8) -> Formats:
    fine, wide = jnp.float8_e4m3fn, jnp.float8_e5m2
    return Formats((fine, fine), (wide, fine), (fine, wide), matmul.scaling == "row")


FORMATS: Mapping[type, Callable[[Any], Formats]] = {Int8: _int8, Float8: _float8}


def product(x: jax.Array, w: jax.Array, matmul: Matmul = None) -> jax.Array:
    """The last axis of x times the first of w: (..., K) and (K, ...) to (..., ...), in x's type; w is float32.

    With eight bits an axis of size N = all of x's others and one of size F = all of w's others are multiplied, and so
    are the gradients. What is not finite in a row or column makes that row or column of the result not finite.
    """
    if matmul is None:
        return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))
    K = w.shape[0]
    y_NF = _quantized(matmul, x.reshape(-1, K), w.reshape(K, -1))
    return y_NF.reshape(*x.shape[:-1], *w.shape[1:])


def quantize(a: jax.Array, dtype: Any, axis: int | None) -> Scaled:
    """Scales `a` to the range of an eight-bit `dtype`, by the absolute maximum along `axis` or of all, and rounds.

    Integers use the whole range; floats are scaled by a power of two, to nearest or, at a tie, to even.
    """
    wide = a.astype(jnp.float32)
    # Magnitudes stand in the order of their bits; a maximum of floats may pass over NaN, on a CPU it does.
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
    """The matrix product a b, float32, of factors rounded to the two types of `pair`."""
    if pair is None:
        return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
    left, right = quantize(a, pair[0], 1 if by_row else None), quantize(b, pair[1], 0 if by_row else None)
    sums = jnp.int32 if jnp.issubdtype(pair[0], jnp.integer) else jnp.float32
    y = jax.lax.dot(left.values, right.values, preferred_element_type=sums)
    return y.astype(jnp.float32) * left.scale * right.scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantized(matmul: Any, x_NK: jax.Array, w_KF: jax.Array) -> jax.Array:
    return _forward(matmul, x_NK, w_KF)[0]


def _forward(matmul: Any, x_NK: jax.Array, w_KF: jax.Array) -> tuple[jax.Array, Pair]:
    formats = FORMATS[type(matmul)](matmul)
    return _multiply(x_NK, w_KF, formats.forward, by_row=formats.by_row).astype(x_NK.dtype), (x_NK, w_KF)


def _backward(matmul: Any, saved: Pair, g_NF: jax.Array) -> Pair:
    """Gradients as if rounding were not there: a step function has none of its own."""
    x_NK, w_KF = saved
    formats = FORMATS[type(matmul)](matmul)
    dx_NK = _multiply(g_NF, w_KF.T, formats.input_gradient, by_row=formats.by_row)
    dw_KF = _multiply(x_NK.T, g_NF, formats.weight_gradient, by_row=formats.by_row)
    return dx_NK.astype(x_NK.dtype), dw_KF.astype(w_KF.dtype)


_quantized.defvjp(_forward, _backward)
