"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): one latent per token holds all keys and
values.

Channels: C latent of keys and values   R rotary   N of a head's query and key without positions   D = N + R   V of a
head's value.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat import sharding
from jaxchat.model import cache as kv
from jaxchat.model import decoding_kernels
from jaxchat.model.dense import Scores
from jaxchat.model.kernels import BACKENDS
from jaxchat.model.layers import Init, initializer
from jaxchat.model.norms import NORMS, Norm, RMSNorm
from jaxchat.model.part import Attends, Aux, Context, Static, param
from jaxchat.model.positions import POSITIONS, Positions, RoPE
from jaxchat.model.products import product


@dataclass(frozen=True)
class MLA:
    """Attention to up-projections of a latent. The cache has kv_rank + rope_dim numbers per token and layer."""

    heads: int  # Number of heads.
    head_dim: int  # Channels of a head's query and key without positions.
    rope_dim: int  # Channels of a query and key with positions; all heads share this part of the key.
    value_dim: int  # Channels of a head's value.
    kv_rank: int  # Channels of the latent of keys and values.
    q_rank: int | None = None  # Channels of the latent of queries; None projects queries from the input.
    positions: Positions = RoPE()  # Of the rope_dim channels only.
    norm: Norm | None = RMSNorm()  # Of both latents.
    init: Init = "uniform"  # Distribution of the initial matrices.

    def __post_init__(self) -> None:
        sizes = (self.heads, self.head_dim, self.value_dim, self.kv_rank, self.q_rank or 1)
        if min(sizes) < 1:
            raise ValueError(f"heads, head_dim, value_dim, kv_rank and q_rank of {self} must be positive")
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim} must be even and at least 2: rotary positions pair its halves")
        POSITIONS[type(self.positions)].check(self.positions, self.rope_dim)

    @staticmethod
    def beside(old: Any, width: int) -> dict[str, Any]:
        """Sizes in place of another attention, with the proportions of DeepSeek-V2-Lite (see `Model.sizes_of`)."""
        sizes = {"rope_dim": old.head_dim // 4 * 2, "value_dim": old.head_dim, "kv_rank": width // 4}
        return {**sizes, "positions": old.positions, "init": old.init}


class LatentCache(NamedTuple):
    """The normalised latent and the rotated shared key of every token, joined (B, 1, S, C + R)."""

    latent_B1SC: jax.Array

    @property
    def axes(self) -> "LatentCache":
        """Logical axes, for placing the cache on a mesh."""
        return LatentCache(("batch", None, None, None))  # type: ignore[arg-type]

    def resize(self, length_B: jax.Array, like: Any) -> "LatentCache":
        resized: LatentCache = kv.resize(self, length_B, like)
        return resized


class LatentAttention(nn.Module):
    """The module of `MLA`; see `part` for the methods."""

    config: MLA
    static: Static

    @nn.compact
    def __call__(
        self, x_BTM: jax.Array, context: Context, cache: LatentCache | None
    ) -> tuple[jax.Array, LatentCache | None, Aux]:
        """Attends from the normalised input; returns the residual update, the cache with x's tokens, and no losses."""
        c, M, H, matmul = self.config, self.static.width, self.config.heads, self.static.matmul
        C, R, N, V = c.kv_rank, c.rope_dim, c.head_dim, c.value_dim

        def weight(name: str, axes: tuple[str, ...], *shape: int) -> jax.Array:
            init = initializer(c.init, shape[0], shape[1] * (shape[2] if len(shape) > 2 else 1))
            return param(self, name, axes, shape, init, group="matrices")

        def norm(name: str, x: jax.Array) -> jax.Array:
            return x if c.norm is None else NORMS[type(c.norm)](c.norm, self.static, ("latent",), name=name)(x)

        code = POSITIONS[type(c.positions)](c.positions, self.static, name="positions")
        latent_BTC = norm("kv_norm", product(x_BTM, weight("kv_down", ("embed", "latent"), M, C), matmul))
        shared_BT1R = product(x_BTM, weight("k_rope", ("embed", "head"), M, R), matmul)[:, :, None]
        shared_BT1R = code.rotate(shared_BT1R, context)
        up_CHN = weight("k_up", ("latent", "heads", "head"), C, H, N)
        up_CHV = weight("v_up", ("latent", "heads", "head"), C, H, V)
        if c.q_rank is None:
            q_BTHD = product(x_BTM, weight("q", ("embed", "heads", "head"), M, H, N + R), matmul)
        else:
            low = norm("q_norm", product(x_BTM, weight("q_down", ("embed", "latent"), M, c.q_rank), matmul))
            q_BTHD = product(low, weight("q_up", ("latent", "heads", "head"), c.q_rank, H, N + R), matmul)
        q_BTHD = sharding.constrain(q_BTHD, ("batch", "length", "heads", "head"))
        q_BTHD = jnp.concatenate([q_BTHD[..., :N], code.rotate(q_BTHD[..., N:], context)], axis=-1)
        q_BTHD = q_BTHD if code.score_factor == 1.0 else q_BTHD * code.score_factor
        scores = Scores(code.bias(H)) if code.biased else None
        if cache is None:
            k_BTHD, v_BTHV = self._up(latent_BTC, shared_BT1R, up_CHN, up_CHV)
            o_BTHV, _ = self.attend(q_BTHD, k_BTHD, v_BTHV, scores, context, None)
        else:
            cache = kv.write(
                cache, context.positions_BT, jnp.concatenate([latent_BTC[:, :, None], shared_BT1R], axis=-1)
            )
            o_BTHV = self._decode(q_BTHD, cache, up_CHN, up_CHV, scores, context)
        axes, init = ("heads", "head", "embed"), initializer("zeros", H * V, M)
        w_HVM = param(self, "o", axes, (H, V, M), init, inputs=2, group="matrices")
        o_BTX = o_BTHV.reshape(*o_BTHV.shape[:2], H * V)
        return product(o_BTX, w_HVM.reshape(H * V, M), matmul), cache, Aux()

    def _up(
        self, latent_BSC: jax.Array, shared_BS1R: jax.Array, up_CHN: jax.Array, up_CHV: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The keys (B, S, H, D) and values (B, S, H, V) of latents."""
        k_BSHN, v_BSHV = (product(latent_BSC, w, self.static.matmul) for w in (up_CHN, up_CHV))
        shared_BSHR = jnp.broadcast_to(shared_BS1R, (*k_BSHN.shape[:3], shared_BS1R.shape[-1]))
        k_BSHD = jnp.concatenate([k_BSHN, shared_BSHR], axis=-1)
        places = ("batch", "length", "heads", "head")
        return sharding.constrain(k_BSHD, places), sharding.constrain(v_BSHV, places)

    def attend(
        self,
        q_BTHD: jax.Array,
        k_BTHD: jax.Array,
        v_BTHV: jax.Array,
        scores: Scores | None,
        context: Context,
        cache: None,
    ) -> tuple[jax.Array, None]:
        """The output (B, T, H, V) of every head without a cache. `trace.trace` notes arguments and output.

        Fused kernels want heads of one size, so queries, keys and values are padded with zeros for them.
        """
        D, V, name = q_BTHD.shape[-1], v_BTHV.shape[-1], self.static.attention
        changed, call = {} if scores is None else {"scores": scores}, BACKENDS[name]
        if not name.startswith("xla") and D != V:
            pad = [(0, 0)] * 3
            q_BTHD = q_BTHD * (max(D, V) / D) ** 0.5  # Backends divide by the root of the padded size.
            q_BTHD, k_BTHD, v_BTHV = (
                jnp.pad(x, [*pad, (0, max(D, V) - x.shape[-1])]) for x in (q_BTHD, k_BTHD, v_BTHV)
            )
        return call(q_BTHD, k_BTHD, v_BTHV, context.segments_BT, None, **changed)[..., :V], None

    def _decode(
        self,
        q_BTHD: jax.Array,
        cache: LatentCache,
        up_CHN: jax.Array,
        up_CHV: jax.Array,
        scores: Scores | None,
        context: Context,
    ) -> jax.Array:
        """Attention to the cache, (B, T, H, V).

        The up-projections are absorbed into queries and outputs, which then attend to latents as to one kv head; a call
        with so many tokens that this is more work than to compute all keys and values computes them.
        """
        c, T = self.config, q_BTHD.shape[1]
        C, R, N, V = c.kv_rank, c.rope_dim, c.head_dim, c.value_dim
        assert context.length_B is not None
        joined_B1SC = cache.latent_B1SC.astype(q_BTHD.dtype)
        decode = functools.partial(decoding_kernels.xla, scores=scores)
        where = (context.positions_BT, context.length_B, None)
        if T * (2 * C - N - V) > C * (N + V):
            k_BSHD, v_BSHV = self._up(joined_B1SC[:, 0, :, :C], joined_B1SC[:, 0, :, None, C:], up_CHN, up_CHV)
            whole = kv.KVCache(k_BSHD.swapaxes(1, 2), v_BSHV.swapaxes(1, 2))
            return decode(q_BTHD, whole, *where)
        up_CHN, up_CHV = up_CHN.astype(q_BTHD.dtype), up_CHV.astype(q_BTHD.dtype)
        q_BTHC = jnp.einsum("BTHN,CHN->BTHC", q_BTHD[..., :N], up_CHN)
        q_BTHX = jnp.concatenate([q_BTHC, q_BTHD[..., N:]], axis=-1) * ((C + R) / (N + R)) ** 0.5
        o_BTHX = decode(q_BTHX, kv.KVCache(joined_B1SC, joined_B1SC), *where)
        return jnp.einsum("BTHC,CHV->BTHV", o_BTHX[..., :C], up_CHV)

    @staticmethod
    def empty(config: MLA, batch: int, length: int, *, write: int, dtype: jnp.dtype) -> LatentCache:
        return LatentCache(jnp.zeros((batch, 1, length, config.kv_rank + config.rope_dim), dtype))

    @staticmethod
    def share(config: MLA, context: Context, dtype: Any) -> dict[Any, Any]:
        return POSITIONS[type(config.positions)].share(config.positions, config.rope_dim, context, dtype)

    @staticmethod
    def kernel(config: MLA) -> Attends:
        size = max(config.head_dim + config.rope_dim, config.value_dim)
        dense = "add the bias of a position encoding to the scores" if POSITIONS[type(config.positions)].biased else ""
        return Attends(config.heads, config.heads, size, None, dense)

    @staticmethod
    def keeps_all(config: MLA) -> bool:
        return True

    @staticmethod
    def rewinds(config: MLA) -> bool:
        return True

    @staticmethod
    def matmul_parameters(config: MLA, width: int) -> int:
        c, D = config, config.head_dim + config.rope_dim
        queries = width * c.heads * D if c.q_rank is None else c.q_rank * (width + c.heads * D)
        keys = width * (c.kv_rank + c.rope_dim) + c.kv_rank * c.heads * (c.head_dim + c.value_dim)
        return queries + keys + c.heads * c.value_dim * width

    @staticmethod
    def attention_flops(config: MLA, length: int) -> int:
        """Training FLOPs per token of q k^T and p v at row length `length`, with keys and values in full."""
        return 6 * config.heads * (config.head_dim + config.rope_dim + config.value_dim) * length
