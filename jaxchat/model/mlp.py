"""Feed-forward layers; `MLPS` maps a configuration type to its module."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat import sharding
from jaxchat.model.layers import Init, initializer
from jaxchat.model.part import Aux, Context, Static, param
from jaxchat.model.products import product


@dataclass(frozen=True)
class ReluSquared:
    """out(relu(in(x))^2) (arXiv:2109.08668)."""

    hidden: int  # Number of hidden units.
    init: Init = "uniform"  # Distribution of the initial matrices.
    init_scale: float = 0.4  # Factor of the initial input matrix.


@dataclass(frozen=True)
class SwiGLU:
    """out(silu(gate(x)) * in(x)) (arXiv:2002.05202)."""

    hidden: int  # Number of hidden units.
    init: Init = "uniform"  # Distribution of the initial matrices.
    init_scale: float = 1.0  # Factor of the initial input matrix.


class ReluSquaredLayer(nn.Module):
    config: ReluSquared
    static: Static

    @nn.compact
    def __call__(self, x_BTM: jax.Array, context: Context) -> tuple[jax.Array, Aux]:
        c, M, F, matmul = self.config, self.static.width, self.config.hidden, self.static.matmul
        w_MF = param(self, "in", ("embed", "hidden"), (M, F), initializer(c.init, M, F, c.init_scale), group="matrices")
        w_FM = param(self, "out", ("hidden", "embed"), (F, M), initializer("zeros", F, M), group="matrices")
        h_BTF = sharding.constrain(product(x_BTM, w_MF, matmul), ("batch", "length", "hidden"))
        return product(jnp.square(jax.nn.relu(h_BTF)), w_FM, matmul), Aux()

    @staticmethod
    def matmul_parameters(config: ReluSquared, width: int) -> int:
        return 2 * width * config.hidden


class SwiGLULayer(nn.Module):
    config: SwiGLU
    static: Static

    @nn.compact
    def __call__(self, x_BTM: jax.Array, context: Context) -> tuple[jax.Array, Aux]:
        c, M, F, matmul = self.config, self.static.width, self.config.hidden, self.static.matmul
        init = initializer(c.init, M, F, c.init_scale)
        g_MF = param(self, "gate", ("embed", "hidden"), (M, F), init, group="matrices")
        w_MF = param(self, "in", ("embed", "hidden"), (M, F), init, group="matrices")
        w_FM = param(self, "out", ("hidden", "embed"), (F, M), initializer("zeros", F, M), group="matrices")
        h_BTF = jax.nn.silu(product(x_BTM, g_MF, matmul)) * product(x_BTM, w_MF, matmul)
        h_BTF = sharding.constrain(h_BTF, ("batch", "length", "hidden"))
        return product(h_BTF, w_FM, matmul), Aux()

    @staticmethod
    def matmul_parameters(config: SwiGLU, width: int) -> int:
        return 3 * width * config.hidden


MLPS: dict[type, Any] = {ReluSquared: ReluSquaredLayer, SwiGLU: SwiGLULayer}
