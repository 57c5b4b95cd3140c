"""Feed-forward layers; `MLPS` maps a configuration type to its module."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn

from jaxchat import sharding
from jaxchat.model.experts import MixtureOfExperts, MoE
from jaxchat.model.layers import ACTIVATIONS, Init, Initializer, initializer
from jaxchat.model.part import Aux, Context, Static, param
from jaxchat.model.products import product


@dataclass(frozen=True)
class Dense:
    """The fields of every dense feed-forward. `activation` names an entry of `layers.ACTIVATIONS`."""

    hidden: int  # Number of hidden units.
    init: Init = "uniform"  # Distribution of the initial matrices.
    init_scale: float = 1.0  # Factor of the initial input matrix.
    bias: bool = False  # Learned numbers added to every product.

    @property
    def activation(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class ReluSquared(Dense):
    """out(relu(in(x))^2) (arXiv:2109.08668)."""

    init_scale: float = 0.4  # Factor of the initial input matrix.
    activation = "relu_squared"


@dataclass(frozen=True)
class GELU(Dense):
    """out(gelu(in(x))), gelu(x) = x * Phi(x) (arXiv:1606.08415)."""

    tanh: bool = True  # Approximate Phi by a tanh, as GPT-2 does, instead of computing it.

    @property
    def activation(self) -> str:
        return "gelu_tanh" if self.tanh else "gelu"


@dataclass(frozen=True)
class SwiGLU(Dense):
    """out(silu(gate(x)) * in(x)) (arXiv:2002.05202)."""

    activation = "silu"


@dataclass(frozen=True)
class GeGLU(Dense):
    """out(gelu(gate(x)) * in(x)) (arXiv:2002.05202)."""

    tanh: bool = True  # Approximate Phi by a tanh, as Gemma does, instead of computing it.
    activation = GELU.activation


class FeedForwardLayer(nn.Module):
    """out(activation(in(x))), with a bias for each product if the configuration asks for them."""

    config: Any
    static: Static

    @nn.compact
    def __call__(self, x_BTM: jax.Array, context: Context) -> tuple[jax.Array, Aux]:
        h_BTF = sharding.constrain(self._hidden(x_BTM), ("batch", "length", "hidden"))
        F, M = self.config.hidden, self.static.width
        return self._product("out", h_BTF, ("hidden", "embed"), initializer("zeros", F, M)), Aux()

    def _hidden(self, x_BTM: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.config.activation](self._into("in", x_BTM))

    def _into(self, name: str, x_BTM: jax.Array) -> jax.Array:
        c, M = self.config, self.static.width
        return self._product(name, x_BTM, ("embed", "hidden"), initializer(c.init, M, c.hidden, c.init_scale))

    def _product(self, name: str, x: jax.Array, axes: tuple[str, str], init: Initializer) -> jax.Array:
        shape = tuple(self.static.width if axis == "embed" else self.config.hidden for axis in axes)
        y = product(x, param(self, name, axes, shape, init, group="matrices"), self.static.matmul)
        if not self.config.bias:
            return y
        axis = "width" if axes[1] == "embed" else axes[1]
        bias = param(self, f"{name}_bias", (axis,), shape[1:], nn.initializers.zeros, group="scalars")
        return y + bias.astype(y.dtype)[None, None]

    @staticmethod
    def matmul_parameters(config: Any, width: int) -> int:
        return 2 * width * config.hidden


class GatedLayer(FeedForwardLayer):
    """out(activation(gate(x)) * in(x))."""

    def _hidden(self, x_BTM: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.config.activation](self._into("gate", x_BTM)) * self._into("in", x_BTM)

    @staticmethod
    def matmul_parameters(config: Any, width: int) -> int:
        return 3 * width * config.hidden


MLPS: dict[type, Any] = {
    ReluSquared: FeedForwardLayer,
    SwiGLU: GatedLayer,
    GELU: FeedForwardLayer,
    GeGLU: GatedLayer,
    MoE: MixtureOfExperts,
}
