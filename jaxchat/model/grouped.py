"""Products of rows, sorted by expert, with the expert's matrix.

`jax.lax.ragged_dot` computes such a product. XLA has it sparse for TPUs only: for CPUs and NVIDIA GPUs it multiplies
all rows with all matrices, so there blocks of rows are multiplied one by one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxchat import sharding
from jaxchat.model.products import NAME, product
from jaxchat.model.quantized import Matmul


class Arranged(NamedTuple):
    """Where sorted rows come from.

    `source_R` is the index of each row in the unsorted ones, out of range for a padding row. `row_S` is the reverse,
    out of range for those of no expert here. `ends_E` is the number of blocks up to the end of each expert's.
    """

    source_R: jax.Array
    row_S: jax.Array
    ends_E: jax.Array
    block: int


def arrange(expert_S: jax.Array, experts: int, block: int) -> Arranged:
    """Sorts rows by expert, each expert's padded to whole blocks; an expert outside of 0 to `experts` - 1 is not here.

    There are as many rows R as the worst distribution needs.
    """
    S = len(expert_S)
    R = (S // block + min(S, experts)) * block if block > 1 else S
    expert_S = jnp.where((expert_S >= 0) & (expert_S < experts), expert_S, experts)
    order_S = jnp.argsort(expert_S, stable=True)
    sorted_S = expert_S[order_S]
    starts = jnp.searchsorted(sorted_S, jnp.arange(experts + 1)).astype(jnp.int32)
    ends_E = jnp.cumsum(-(-jnp.diff(starts) // block))
    first = jnp.concatenate([jnp.zeros(1, ends_E.dtype), ends_E]) * block - starts  # Row less index, by expert.
    row_S = jnp.where(sorted_S < experts, first[sorted_S] + jnp.arange(S, dtype=jnp.int32), R)
    source_R = jnp.full((R,), S, jnp.int32).at[row_S].set(order_S.astype(jnp.int32), mode="drop")
    return Arranged(source_R, jnp.zeros_like(row_S).at[order_S].set(row_S), ends_E, block)


@jax.custom_vjp
def move(x: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """x[index], zero where the index is out of range. With the inverse, `back`, the gradient is a look-up, too."""
    return x.at[index].get(mode="fill", fill_value=0)


move.defvjp(
    lambda x, index, back: (move(x, index, back), (index, back)),
    lambda saved, g: (move(g, saved[1], saved[0]), None, None),
)


def grouped_product(x_RK: jax.Array, w_EKF: jax.Array, where: Arranged, matmul: Matmul) -> jax.Array:
    """Each row times its expert's matrix, (R, F); what it returns for padding rows is not used."""
    if sharding.platform() == "tpu" and matmul is None:
        blocks_E = jnp.diff(where.ends_E, prepend=0)
        y_RF = jax.lax.ragged_dot(x_RK, w_EKF, blocks_E * where.block)
    else:
        y_RF = _blocked(matmul, where.block, x_RK, w_EKF, where.ends_E)
    return checkpoint_name(y_RF, NAME)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(matmul: Matmul, block: int, x_RK: jax.Array, w_EKF: jax.Array, ends_E: jax.Array) -> jax.Array:
    """Blocks of rows, as many as there are, one by one."""

    def step(i: jax.Array, y_RF: jax.Array) -> jax.Array:
        y = product(_rows(x_RK, i, block), w_EKF[_expert_of(i, ends_E)], matmul)
        return jax.lax.dynamic_update_slice_in_dim(y_RF, y, i * block, 0)

    return jax.lax.fori_loop(0, ends_E[-1], step, jnp.zeros((len(x_RK), w_EKF.shape[-1]), x_RK.dtype))


def _backward(matmul: Matmul, block: int, saved: Any, g_RF: jax.Array) -> Any:
    """The gradient of a matrix is added up in float32 over its expert's blocks."""
    x_RK, w_EKF, ends_E = saved

    def step(i: jax.Array, sums: Any) -> Any:
        dx_RK, dw_EKF = sums
        e = _expert_of(i, ends_E)
        _, pull = jax.vjp(lambda x, w: product(x, w, matmul), _rows(x_RK, i, block), w_EKF[e])
        dx, dw = pull(_rows(g_RF, i, block))
        return jax.lax.dynamic_update_slice_in_dim(dx_RK, dx, i * block, 0), dw_EKF.at[e].add(dw)

    wide = jnp.promote_types(w_EKF.dtype, jnp.float32)
    dx_RK, dw_EKF = jax.lax.fori_loop(0, ends_E[-1], step, (jnp.zeros_like(x_RK), jnp.zeros(w_EKF.shape, wide)))
    return dx_RK, dw_EKF.astype(w_EKF.dtype), None


_blocked.defvjp(lambda matmul, block, *args: (_blocked(matmul, block, *args), args), _backward)


def _rows(x: jax.Array, i: jax.Array, block: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, 0)


def _expert_of(i: jax.Array, ends_E: jax.Array) -> jax.Array:
    """The expert of block i."""
    return jnp.sum(ends_E <= i)
