"""Mixture of experts: a router sends every token to some of many feed-forwards. No token is dropped.

E experts   N tokens   K experts of a token   R rows, sorted by expert and padded to blocks
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat import sharding
from jaxchat.model.grouped import arrange, grouped_product, move
from jaxchat.model.layers import ACTIVATIONS, Init, initializer
from jaxchat.model.part import Aux, Context, Static, Weighted, param
from jaxchat.model.products import product

UNIT = 2.0**-80  # Of the selection bias's gradient: exact, and too small to count in the norm of all gradients.
FEW = 4  # Experts for each active one, up to which GPUs compute all experts of all tokens.


@dataclass(frozen=True)
class MoE:
    """A mixture of experts (arXiv:1701.06538) with shared and fine-grained experts (DeepSeekMoE, arXiv:2401.06066).

    A token's gates are its router's scores of the experts chosen for it. Balance comes from a bias of the selection
    (arXiv:2408.15664), whose step is `--optimizer.selection_bias`, from a loss, from both or from neither.
    """

    experts: int  # Number of routed experts.
    active: int  # Routed experts per token.
    hidden: int  # Number of hidden units of a routed expert.
    shared: int = 0  # Number of hidden units of the expert that all tokens share; 0 for none.
    activation: Literal["silu", "gelu", "gelu_tanh", "relu_squared"] = "silu"  # Of the hidden units.
    gated: bool = True  # Multiply the activation by a second projection of the input (SwiGLU, GeGLU).
    router: Literal["sigmoid", "softmax"] = "sigmoid"  # What makes scores of the router's logits.
    normalise: bool = True  # Divide a token's gates by their sum.
    scale: float = 1.0  # Factor of the gates.
    gate: Literal["after", "before"] = "after"  # Multiply the gate with the expert's output or input.
    groups: int = 1  # Number of groups of experts.
    top_groups: int = 1  # Groups from which a token's experts are chosen.
    group_best: int = 2  # Number of a group's best experts whose scores rank it.
    selection_bias: bool = True  # Choose experts by score plus a bias that evens their loads out.
    balance_loss: float = 0.0  # Coefficient of a loss that evens out the loads in every row.
    z_loss: float = 0.0  # Coefficient of the mean of logsumexp(logits)^2 (arXiv:2202.08906).
    path: Literal["auto", "masked", "sorted"] = "auto"  # Compute all experts of all tokens, or only the chosen ones.
    init: Init = "uniform"  # Distribution of the initial matrices.
    init_scale: float = 1.0  # Factor of the initial input matrices.

    def __post_init__(self) -> None:
        if not 1 <= self.active < self.experts:
            raise ValueError(f"active={self.active} must lie between 1 and experts={self.experts} less one")
        if self.active == 1 and self.normalise:
            raise ValueError(
                "active=1 has normalised gates of 1, from which a router learns nothing: set normalise=False"
            )
        if self.hidden < 1 or self.shared < 0:
            raise ValueError(f"hidden={self.hidden} must be positive and shared={self.shared} not negative")
        if self.groups < 1 or self.experts % self.groups:
            raise ValueError(f"experts={self.experts} is not a multiple of groups={self.groups}")
        size = self.experts // self.groups
        if not 1 <= self.top_groups <= self.groups or self.top_groups * size < self.active:
            raise ValueError(f"top_groups={self.top_groups} of {self.groups} groups cannot hold {self.active} experts")
        if self.groups > 1 and not 1 <= self.group_best <= size:
            raise ValueError(f"group_best={self.group_best} must lie between 1 and the {size} experts of a group")
        for name in ("scale", "balance_loss", "z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative")

    @staticmethod
    def beside(old: Any, width: int) -> dict[str, Any]:
        """Sizes in place of another feed-forward, see `Model.sizes_of`."""
        return {"experts": 8, "active": 2}


class MixtureOfExperts(nn.Module):
    """The module of `MoE`; see `part` for the methods."""

    config: MoE
    static: Static

    @nn.compact
    def __call__(self, x_BTM: jax.Array, context: Context) -> tuple[jax.Array, Aux]:
        c, M, E = self.config, self.static.width, self.config.experts
        init = initializer(c.init if c.init != "zeros" else "uniform", M, E)
        router_ME = param(self, "router", ("embed", "routes"), (M, E), init, group="router", exact=True)
        bias_E = None
        if c.selection_bias:
            zeros = nn.initializers.zeros_init()
            bias_E = param(self, "selection_bias", ("routes",), (E,), zeros, group="selection_bias", exact=True)
        weights, shared = self._weights("", c.hidden, True), self._weights("shared_", c.shared, False)
        if self.is_initializing():
            return jnp.zeros_like(x_BTM), Aux()
        wide = jnp.promote_types(x_BTM.dtype, jnp.float32)
        z_BTE = jnp.einsum(
            "BTM,ME->BTE", x_BTM.astype(wide), router_ME.astype(wide), precision=jax.lax.Precision.HIGHEST
        )
        score_BTE = jax.nn.softmax(z_BTE) if c.router == "softmax" else jax.nn.sigmoid(z_BTE)
        chosen_BTK, gates_BTK = choose(c, score_BTE, bias_E)
        load_BE = jax.nn.one_hot(chosen_BTK, E, dtype=wide).sum(axis=(1, 2))
        load_E = load_BE.sum(axis=0)
        if bias_E is not None:
            gates_BTK = _with_load(gates_BTK, bias_E, E * load_E - load_E.sum())
        y_BTM = self._routed(x_BTM, chosen_BTK, gates_BTK, weights)
        if c.shared:
            multiply = functools.partial(product, matmul=self.static.matmul)
            y_BTM = y_BTM + _expert(c, multiply, x_BTM, None, shared)
        return y_BTM, Aux(_losses(c, z_BTE, score_BTE, load_BE), _statistics(load_E))

    def _weights(self, prefix: str, hidden: int, routed: bool) -> dict[str, jax.Array]:
        """The matrices of the routed experts, stacked, or of the shared one; none without hidden units."""
        c, M, F = self.config, self.static.width, hidden
        lead, size = (("experts",), (c.experts,)) if routed else ((), ())
        found = {}
        for name in (*(("gate",) if c.gated else ()), "in", "out") if hidden else ():
            out = name == "out"
            axes, shape = (("hidden", "embed"), (F, M)) if out else (("embed", "hidden"), (M, F))
            init = initializer("zeros" if out else c.init, *shape, c.init_scale)
            named, axes, shape = prefix + name, (*lead, *axes), (*size, *shape)
            found[name] = param(self, named, axes, shape, init, group="matrices", stack=routed)
        return found

    def _routed(
        self, x_BTM: jax.Array, chosen_BTK: jax.Array, gates_BTK: jax.Array, weights: Mapping[str, jax.Array]
    ) -> jax.Array:
        """The sum of the chosen experts' outputs times their gates. Devices along `expert` compute their own experts
        for each other's tokens."""
        c, matmul, names = self.config, self.static.matmul, tuple(weights)

        def local(x_BTM: jax.Array, chosen: jax.Array, gates: jax.Array, own_E: jax.Array, *own: jax.Array) -> Any:
            """On one device, whose experts are own_E."""
            x_NM, K = x_BTM.reshape(-1, x_BTM.shape[-1]), c.active
            path = by_mask if _path(c) == "masked" else by_sorting
            call = (x_NM, chosen.reshape(-1, K), gates.reshape(-1, K), own_E, dict(zip(names, own)))
            return path(c, *call, matmul).reshape(x_BTM.shape)

        rows, places = ("expert_batch", "length", None), {"out": ("experts", "hidden", None)}
        axes = (rows, rows, rows, ("experts",), *(places.get(name, ("experts", None, "hidden")) for name in names))
        cast = (w.astype(x_BTM.dtype) for w in weights.values())
        arrays = (x_BTM, chosen_BTK, gates_BTK, jnp.arange(c.experts), *cast)
        y_BTM = sharding.on_each_device(local, arrays, axes, summed=("experts", "hidden"))
        return sharding.constrain(y_BTM, ("batch", "length", "width"))

    @staticmethod
    def matmul_parameters(config: MoE, width: int) -> int:
        matrices = 3 if config.gated else 2
        return width * (config.experts + matrices * (config.active * config.hidden + config.shared))

    @staticmethod
    def unused_parameters(config: MoE, width: int) -> int:
        return (3 if config.gated else 2) * width * config.hidden * (config.experts - config.active)


def choose(c: MoE, score_BTE: jax.Array, bias_E: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The experts of every token, (B, T, K), and their gates. The bias and the groups matter only for the choice.

    With groups (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), experts are chosen among those of the best groups.
    """
    by_BTE = jax.lax.stop_gradient(score_BTE if bias_E is None else score_BTE + bias_E[None, None])
    if c.groups > 1:
        by_BTGS = by_BTE.reshape(*by_BTE.shape[:-1], c.groups, -1)
        rank_BTG = jax.lax.top_k(by_BTGS, c.group_best)[0].sum(axis=-1)
        best_BTG = jax.lax.top_k(rank_BTG, c.top_groups)[1]
        open_BTG = jax.nn.one_hot(best_BTG, c.groups, dtype=bool).any(axis=-2)
        by_BTE = jnp.where(open_BTG[..., None], by_BTGS, -jnp.inf).reshape(by_BTE.shape)
    chosen_BTK = jax.lax.top_k(by_BTE, c.active)[1]
    gates_BTK = jnp.take_along_axis(score_BTE, chosen_BTK, axis=-1)
    if c.normalise:
        gates_BTK = gates_BTK / (jnp.sum(gates_BTK, axis=-1, keepdims=True) + 1e-20)
    return chosen_BTK, gates_BTK * c.scale


@jax.custom_vjp
def _with_load(gates_BTK: jax.Array, bias_E: jax.Array, excess_E: jax.Array) -> jax.Array:
    """Returns the gates; the gradient of `bias_E` is the excess of an expert's tokens over the mean (times E * UNIT).

    A sum over tokens as a gradient is summed over micro-batches and devices with the others, in whole numbers, so its
    sign depends on neither; the optimizer steps against it.
    """
    return gates_BTK


_with_load.defvjp(
    lambda gates_BTK, bias_E, excess_E: (gates_BTK, (bias_E, excess_E)),
    lambda saved, g_BTK: (g_BTK, (saved[1] * UNIT).astype(saved[0].dtype), jnp.zeros_like(saved[1])),
)


def _losses(c: MoE, z_BTE: jax.Array, score_BTE: jax.Array, load_BE: jax.Array) -> dict[str, Weighted]:
    """The loss of balance, E * sum over experts of share of the tokens times mean score (arXiv:2101.03961, equation 4),
    1 for even loads; its shares are those within a row, so that it is a mean over rows. And the router's z-loss."""
    losses, (B, T) = {}, z_BTE.shape[:2]
    if c.balance_loss:
        share_BE = load_BE / (T * c.active)
        mean_BE = jnp.mean(score_BTE / jnp.sum(score_BTE, axis=-1, keepdims=True), axis=1)
        total = c.balance_loss * c.experts * jnp.sum(share_BE * mean_BE)
        losses["balance_loss"] = (total, jnp.full((), B, total.dtype))
    if c.z_loss:
        total = c.z_loss * jnp.sum(jnp.square(jax.nn.logsumexp(z_BTE, axis=-1)))
        losses["router_z_loss"] = (total, jnp.full((), B * T, total.dtype))
    return losses


def _statistics(load_E: jax.Array) -> dict[str, Weighted]:
    """Of the loads in a micro-batch and layer: the largest over the mean, the entropy as a share of that of even loads,
    and the busiest expert's share."""
    share_E, one = load_E / load_E.sum(), jnp.ones((), load_E.dtype)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share_E, share_E)) / math.log(len(load_E))
    busiest = jnp.max(share_E)
    found = {"imbalance": busiest * len(load_E), "entropy": entropy, "busiest": busiest}
    return {f"experts_{name}": (value, one) for name, value in found.items()}


Multiply = Callable[[jax.Array, jax.Array], jax.Array]


def _expert(
    c: MoE, multiply: Multiply, x: jax.Array, gate: jax.Array | None, weights: Mapping[str, jax.Array]
) -> jax.Array:
    """A feed-forward of rows x, whose gates (one per row) apply before or after it; None for the shared expert."""
    by = 1 if gate is None else gate[:, None]
    inputs = (x * by).astype(x.dtype) if c.gate == "before" else x
    h, activation = multiply(inputs, weights["in"]), ACTIVATIONS[c.activation]
    h = activation(multiply(inputs, weights["gate"])) * h if c.gated else activation(h)
    return multiply((h * by).astype(x.dtype) if c.gate == "after" else h, weights["out"])


def by_mask(
    c: MoE, x_NM: jax.Array, chosen: jax.Array, gates: jax.Array, own_E: jax.Array, weights: Any, matmul: Any
) -> jax.Array:
    """All experts of all tokens; the gates of those that were not chosen are zero."""
    gates_EN = jnp.sum(jnp.where(chosen[None] == own_E[:, None, None], gates[None], 0), axis=2)
    multiply = functools.partial(product, matmul=matmul)
    return jax.vmap(lambda gate_N, own: _expert(c, multiply, x_NM, gate_N, own))(gates_EN, weights).sum(axis=0)


def by_sorting(
    c: MoE, x_NM: jax.Array, chosen: jax.Array, gates: jax.Array, own_E: jax.Array, weights: Any, matmul: Any
) -> jax.Array:
    """Copies every token to a row for each of its experts, sorted by expert, and adds the results."""
    N, K = chosen.shape
    where = arrange(chosen.reshape(-1) - own_E[0], len(own_E), block_rows(c, N))
    x_RM = move(jnp.repeat(x_NM, K, axis=0), where.source_R, where.row_S)
    gate_R = move(gates.reshape(-1), where.source_R, where.row_S)
    y_RM = _expert(c, lambda x, w: grouped_product(x, w, where, matmul), x_RM, gate_R, weights)
    return move(y_RM, where.row_S, where.source_R).reshape(N, K, -1).sum(axis=1)


def block_rows(c: MoE, tokens: int) -> int:
    """Rows per block: about a quarter of an expert's mean number, a power of two from 8 to 128."""
    return 2 ** min(max(round(math.log2(max(tokens * c.active / c.experts / 4, 1))), 3), 7)


def _path(c: MoE) -> str:
    """The path by which these experts are computed on the current platform, see docs/decisions.md."""
    few = sharding.platform() == "gpu" and c.experts <= FEW * c.active
    return c.path if c.path != "auto" else "masked" if few else "sorted"
