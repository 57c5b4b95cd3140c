"""Grouped-query attention with windows; `MIXERS` maps a configuration type to its module.

All backends follow the mask rule of `dense.visible`: `kernels.BACKENDS` attend without a cache,
`decoding_kernels.DECODING` with one.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat import sharding
from jaxchat.model import cache as kv
from jaxchat.model.decoding_kernels import DECODING
from jaxchat.model.dense import Scores
from jaxchat.model.kernels import BACKENDS
from jaxchat.model.latent import MLA, LatentAttention
from jaxchat.model.layers import Init, centred_uniform, check_dropout, initializer, look_up, uniform_between
from jaxchat.model.norms import NORMS, Norm, RMSNorm
from jaxchat.model.part import Attends, Aux, Context, Static, param
from jaxchat.model.positions import POSITIONS, Encoding, Positions, RoPE
from jaxchat.model.products import product

GATE_INIT = (0.0, 0.02)


@dataclass(frozen=True)
class ValueEmbedding:
    """An embedding table added to v, times a gate per kv head: scale * sigmoid(x[:gate_channels] W)."""

    gate_channels: int = 12  # Channels of the residual stream that the gate reads.
    scale: float = 3.0  # Largest value of the gate.


@dataclass(frozen=True)
class GQA:
    """Causal grouped-query attention (arXiv:2305.13245). With a `window` a query sees that many earlier tokens."""

    heads: int  # Number of query heads.
    kv_heads: int  # Number of key and value heads, which divides heads.
    head_dim: int  # Channels per head.
    window: int | None = None  # Number of earlier tokens that a query sees; None for all.
    positions: Positions = RoPE()
    qk_norm: Norm | None = RMSNorm()
    qk_scale: float = 1.0  # Factor of normalised queries and keys.
    value_embedding: ValueEmbedding | None = None
    init: Init = "uniform"  # Distribution of the initial matrices.
    qk_norm_first: bool = False  # Normalise queries and keys before positions rotate them instead of after.
    qk_norm_whole: bool = False  # Normalise over all heads at once instead of each head.
    qkv_bias: bool = False  # Learned numbers added to queries, keys and values.
    o_bias: bool = False  # Learned numbers added to the output.
    scale: float | None = None  # Factor of the scores; None for 1 / sqrt(head_dim).
    softcap: float | None = None  # Scores are softcap * tanh(scores / softcap); None leaves them.
    sinks: bool = False  # A learned score per head that takes weight from the keys.
    dropout: float = 0.0  # Share of the attention weights that training drops.

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even and at least 2: rotary positions pair its halves")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or None for all earlier tokens")
        for name in ("scale", "softcap"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite, or None")
        POSITIONS[type(self.positions)].check(self.positions, self.head_dim)
        check_dropout(self.dropout)

    @staticmethod
    def beside(old: Any, width: int) -> dict[str, Any]:
        """Sizes in place of another attention: as many key and value heads as queries (see `Model.sizes_of`)."""
        return {"kv_heads": old.heads, "positions": old.positions, "init": old.init}


class GroupedQueryAttention(nn.Module):
    """The module of `GQA`; see `part` for the methods."""

    config: GQA
    static: Static

    @nn.compact
    def __call__(
        self, x_BTM: jax.Array, context: Context, cache: kv.KVCache | None
    ) -> tuple[jax.Array, kv.KVCache | None, Aux]:
        """Attends from the normalised input; returns the residual update, the cache with x's tokens, and no losses."""
        c, M, H, K, D = self.config, self.static.width, self.config.heads, self.config.kv_heads, self.config.head_dim

        def project(name: str, axis: str, heads: int) -> jax.Array:
            w_MHD = param(
                self, name, ("embed", axis, "head"), (M, heads, D), initializer(c.init, M, heads * D), group="matrices"
            )
            y_BTHD = product(x_BTM, w_MHD, self.static.matmul)
            if c.qkv_bias:
                y_BTHD = (
                    y_BTHD + self._vector(f"{name}_bias", (axis, "head"), (heads, D)).astype(y_BTHD.dtype)[None, None]
                )
            return sharding.constrain(y_BTHD, ("batch", "length", axis, "head"))

        q_BTHD, k_BTKD, v_BTKD = project("q", "heads", H), project("k", "kv_heads", K), project("v", "kv_heads", K)
        if c.value_embedding is not None:
            v_BTKD = v_BTKD + self._value_embedding(c.value_embedding, x_BTM, context.tokens_BT)
        code = POSITIONS[type(c.positions)](c.positions, self.static, name="positions")
        q_BTHD, k_BTKD = self._prepare("q", q_BTHD, code, context), self._prepare("k", k_BTKD, code, context)
        factor = code.score_factor * (1.0 if c.scale is None else c.scale * D**0.5)
        q_BTHD = q_BTHD if factor == 1.0 else q_BTHD * factor
        o_BTHD, cache = self.attend(q_BTHD, k_BTKD, v_BTKD, self._scores(code, context), context, cache)
        w_HDM = param(
            self, "o", ("heads", "head", "embed"), (H, D, M), initializer("zeros", H * D, M), inputs=2, group="matrices"
        )
        # One contracted axis: with two, XLA may transpose the matrix again for every decoded token.
        o_BTX = o_BTHD.reshape(*o_BTHD.shape[:2], H * D)
        y_BTM = product(o_BTX, w_HDM.reshape(H * D, M), self.static.matmul)
        if c.o_bias:
            y_BTM = y_BTM + self._vector("o_bias", ("width",), (M,)).astype(y_BTM.dtype)[None, None]
        return y_BTM, cache, Aux()

    def attend(
        self,
        q_BTHD: jax.Array,
        k_BTKD: jax.Array,
        v_BTKD: jax.Array,
        scores: Scores | None,
        context: Context,
        cache: kv.KVCache | None,
    ) -> tuple[jax.Array, kv.KVCache | None]:
        """The output (B, T, H, D) of every head, and the cache. `trace.trace` notes arguments and output."""
        window, changed = self.config.window, {} if scores is None else {"scores": scores}
        if cache is None:
            # Tokens of a segment are in order, so differences of indices equal differences of positions.
            attend = BACKENDS[self.static.attention]
            return attend(q_BTHD, k_BTKD, v_BTKD, context.segments_BT, window, **changed), None
        assert context.length_B is not None
        cache = kv.write(cache, context.positions_BT, k_BTKD, v_BTKD)
        decode = DECODING[self.static.decoding]
        return decode(q_BTHD, cache, context.positions_BT, context.length_B, window, **changed), cache

    def _scores(self, code: Encoding, context: Context) -> Scores | None:
        """What is done to the scores, None if nothing."""
        c, H = self.config, self.config.heads
        sinks_H = self._vector("sinks", ("heads",), (H,)) if c.sinks else None
        key = context.key if c.dropout else None
        if (c.softcap, sinks_H, key) == (None, None, None) and not code.biased:
            return None
        return Scores(code.bias(H) if code.biased else None, c.softcap, sinks_H, c.dropout, key)

    def _prepare(self, name: str, x_BTHD: jax.Array, code: Encoding, context: Context) -> jax.Array:
        """Rotates, normalises and scales queries or keys."""
        c = self.config

        def normalise(x_BTHD: jax.Array) -> jax.Array:
            if c.qk_norm is None:
                return x_BTHD
            axes = ("heads" if name == "q" else "kv_heads", "head") if c.qk_norm_whole else ("head",)
            y_BTHD: jax.Array = NORMS[type(c.qk_norm)](c.qk_norm, self.static, axes, name=f"{name}_norm")(x_BTHD)
            return y_BTHD

        steps = [lambda x_BTHD: code.rotate(x_BTHD, context), normalise]
        for step in reversed(steps) if c.qk_norm_first else steps:
            x_BTHD = step(x_BTHD)
        return x_BTHD if c.qk_scale == 1.0 else x_BTHD * c.qk_scale

    def _vector(self, name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
        return param(self, name, axes, shape, nn.initializers.zeros, group="scalars")

    def _value_embedding(self, value: ValueEmbedding, x_BTM: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        K, D, C = self.config.kv_heads, self.config.head_dim, value.gate_channels
        shape, axes = (self.static.vocab, K, D), ("tokens", "kv_heads", "head")
        init, group = centred_uniform(self.static.width**-0.5), "value_embeddings"
        table_VKD = param(self, "value_embedding", axes, shape, init, group=group)
        gate_CK = param(self, "value_gate", ("gate", "kv_heads"), (C, K), uniform_between(*GATE_INIT), group="matrices")
        gate_BTK = value.scale * jax.nn.sigmoid(x_BTM[..., :C] @ gate_CK.astype(x_BTM.dtype))
        return gate_BTK[..., None] * look_up(table_VKD, tokens_BT, axes, x_BTM.dtype)

    @staticmethod
    def empty(config: GQA, batch: int, length: int, *, write: int, dtype: jnp.dtype) -> kv.KVCache:
        """A cache for `length` positions per row, of which one call writes up to `write`."""
        shape = (batch, config.kv_heads, kv.ring_slots(length, config.window, write), config.head_dim)
        return kv.KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @staticmethod
    def share(config: GQA, context: Context, dtype: Any) -> dict[Any, Any]:
        return POSITIONS[type(config.positions)].share(config.positions, config.head_dim, context, dtype)

    @staticmethod
    def kernel(config: GQA) -> Attends:
        only_dense = {
            "add the bias of a position encoding to the scores": POSITIONS[type(config.positions)].biased,
            f"cap the scores (softcap={config.softcap})": config.softcap is not None,
            "attend to sinks": config.sinks,
        }
        dense = next((what for what, is_used in only_dense.items() if is_used), "")
        return Attends(config.heads, config.kv_heads, config.head_dim, config.window, dense, config.dropout > 0)

    @staticmethod
    def keeps_all(config: GQA) -> bool:
        """Whether the cache holds every earlier position, so that any prefix of it can be reused."""
        return config.window is None

    @staticmethod
    def rewinds(config: GQA) -> bool:
        """Whether the last positions may be written again after they were rolled back, as speculation does."""
        return True

    @staticmethod
    def matmul_parameters(config: GQA, width: int) -> int:
        gate = 0 if config.value_embedding is None else config.value_embedding.gate_channels * config.kv_heads
        return 2 * width * (config.heads + config.kv_heads) * config.head_dim + gate

    @staticmethod
    def attention_flops(config: GQA, length: int) -> int:
        """Training FLOPs per token of q k^T and p v at row length `length` (nanochat: 12 H D min(window, T))."""
        seen = length if config.window is None else min(config.window, length)
        return 12 * config.heads * config.head_dim * seen


MIXERS: dict[type, Any] = {GQA: GroupedQueryAttention, MLA: LatentAttention}
