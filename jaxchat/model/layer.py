"""A layer: a mixer and a feed-forward, each with a norm whose place in the residual stream is set by `PLACEMENTS`."""

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
from flax import linen as nn

from jaxchat import sharding
from jaxchat.model.attention import MIXERS
from jaxchat.model.layers import check_dropout, dropout
from jaxchat.model.mlp import MLPS
from jaxchat.model.norms import NORMS, Norm, RMSNorm
from jaxchat.model.part import Aux, Context, Static, add_aux

Sublayer = Callable[[jax.Array], jax.Array]
Normalise = Callable[[str, jax.Array], jax.Array]  # Applies the norm whose parameters have the given name.


def before(x_BTM: jax.Array, f: Sublayer, norm: Normalise) -> jax.Array:
    """x + f(norm(x)) (arXiv:2002.04745)."""
    return x_BTM + f(norm("norm", x_BTM))


def after(x_BTM: jax.Array, f: Sublayer, norm: Normalise) -> jax.Array:
    """norm(x + f(x)) (arXiv:1706.03762)."""
    return norm("norm", x_BTM + f(x_BTM))


def inside(x_BTM: jax.Array, f: Sublayer, norm: Normalise) -> jax.Array:
    """x + norm(f(x)) (OLMo 2, arXiv:2501.00656)."""
    return x_BTM + norm("norm", f(x_BTM))


def sandwich(x_BTM: jax.Array, f: Sublayer, norm: Normalise) -> jax.Array:
    """x + norm(f(norm(x))), with two norms (arXiv:2105.13290; Gemma 2, arXiv:2408.00118)."""
    return x_BTM + norm("norm_after", f(norm("norm", x_BTM)))


PLACEMENTS: Mapping[str, Callable[[jax.Array, Sublayer, Normalise], jax.Array]] = {
    "before": before,
    "after": after,
    "inside": inside,
    "sandwich": sandwich,
}


if TYPE_CHECKING:
    Mixer = Any
    FeedForward = Any
    Placement = str
else:
    Mixer, FeedForward = (functools.reduce(operator.or_, table) for table in (MIXERS, MLPS))
    Placement = Literal[tuple(PLACEMENTS)]


@dataclass(frozen=True)
class Layer:
    """One layer of the pattern. `placement` names an entry of PLACEMENTS: where the norms are applied."""

    mixer: Mixer
    mlp: FeedForward
    norm: Norm = RMSNorm()
    placement: Placement = "before"  # Where the norms are applied.
    dropout: float = 0.0  # Share of the channels that mixer and feed-forward add which training drops.

    def __post_init__(self) -> None:
        check_dropout(self.dropout)


class Block(nn.Module):
    """Applies a layer to the residual stream."""

    layer: Layer
    static: Static

    @nn.compact
    def __call__(self, x_BTM: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any, Aux]:
        """Returns the residual stream after the layer, the cache with x's tokens, and the sum of the parts' Aux."""
        c, auxes = self.layer, list[Aux]()
        mixer = MIXERS[type(c.mixer)](c.mixer, self.static, name="mixer")
        mlp = MLPS[type(c.mlp)](c.mlp, self.static, name="mlp")

        def keyed(part: int) -> Context:
            return context if context.key is None else context._replace(key=jax.random.fold_in(context.key, part))

        def mix(x_BTM: jax.Array) -> jax.Array:
            nonlocal cache
            y_BTM, cache, aux = mixer(x_BTM, keyed(0), cache)
            auxes.append(aux)
            return dropout(y_BTM, c.dropout, keyed(2).key)

        def feed_forward(x_BTM: jax.Array) -> jax.Array:
            y_BTM, aux = mlp(x_BTM, keyed(1))
            auxes.append(aux)
            return dropout(y_BTM, c.dropout, keyed(3).key)

        for name, sublayer in (("mixer", mix), ("mlp", feed_forward)):
            x_BTM = PLACEMENTS[c.placement](x_BTM, sublayer, functools.partial(self._norm, name))
        return sharding.constrain(x_BTM, ("batch", "length", "width")), cache, add_aux(auxes)

    def _norm(self, part: str, name: str, x_BTM: jax.Array) -> jax.Array:
        y_BTM: jax.Array = NORMS[type(self.layer.norm)](self.layer.norm, self.static, name=f"{part}_{name}")(x_BTM)
        return y_BTM
