"""The large matrix products of the layers and of attention, and their gradients."""

import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxchat.model.quantized import Matmul, quantized_product

NAME = "product"  # Checkpoint name of the results, which the rematerialisation policy "dots" saves.


def product(x: jax.Array, w: jax.Array, matmul: Matmul = None) -> jax.Array:
    """Contracts the last axis of x with the first of w: (..., K) and (K, ...) to (..., ...), in x's type; w is float32.

    In eight bits the operands are flattened to (N, K) and (K, F), and gradients use the types in its `formats`.
    A non-finite number makes its row or column of the result non-finite.
    """
    if matmul is None:
        return checkpoint_name(_unquantized(x, w.astype(x.dtype)), NAME)
    K = w.shape[0]
    y_NF = quantized_product(matmul, x.reshape(-1, K), w.reshape(K, -1))
    return checkpoint_name(y_NF.reshape(*x.shape[:-1], *w.shape[1:]), NAME)


def sum_of_products(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """a^T b over the last two axes: (..., N, K) and (..., N, F) to (..., K, F), in `dtype`.

    On a CPU the narrower operand goes left: XLA takes up to twice as long if the wider one does. The barrier keeps it
    from turning the product around again.
    """

    def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
        batch, n = tuple(range(a.ndim - 2)), a.ndim - 2
        return jax.lax.dot_general(a, b, (((n,), (n,)), (batch, batch)), preferred_element_type=dtype)

    def narrow_left(a: jax.Array, b: jax.Array) -> jax.Array:
        if a.shape[-1] <= b.shape[-1]:
            return multiply(a, b)
        return jax.lax.optimization_barrier(multiply(b, a)).swapaxes(-2, -1)

    return jax.lax.platform_dependent(a, b, cpu=narrow_left, default=multiply)


@jax.custom_vjp
def _unquantized(x: jax.Array, w: jax.Array) -> jax.Array:
    """`product` in the compute type. Autodiff's own weight gradient takes twice as long on a CPU."""
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _unquantized_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    K = w.shape[0]
    dx = jax.lax.dot_general(g, w, ((tuple(range(x.ndim - 1, g.ndim)), tuple(range(1, w.ndim))), ((), ())))
    dw = sum_of_products(x.reshape(-1, K), g.reshape(-1, math.prod(w.shape[1:])), w.dtype)
    return dx, dw.reshape(w.shape)


_unquantized.defvjp(lambda x, w: (_unquantized(x, w), (x, w)), _unquantized_backward)
