"""Position encodings; `POSITIONS` maps a configuration type to its module, None to one that does nothing.

A mixer's field `positions` chooses its encoding. A module overrides those methods of `Encoding` that it needs: it may
change the embedding, rotate queries and keys, or add a bias to the scores.
"""

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat.model.part import Context, Static


class Encoding(nn.Module):
    """The interface, and the encoding of None. `biased` states whether `bias` is used, which only xla attention can."""

    config: Any
    static: Static
    biased = False

    def embed(self, x_BTM: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The embedding of the tokens; called once for all layers of equal encoding."""
        return x_BTM

    def rotate(self, x_BTHD: jax.Array, context: Context) -> jax.Array:
        """Queries or keys; the cache holds rotated keys."""
        return x_BTHD

    def bias(self, heads: int, q_positions_BT: jax.Array, k_positions_BS: jax.Array) -> jax.Array:
        """The bias of the scores (B, H, T, S), where B may be 1; positions are -1 where there is no token."""
        raise NotImplementedError

    @staticmethod
    def share(config: Any, head_dim: int, context: Context, dtype: Any) -> dict[Any, Any]:
        """Values for `Context.shared`, which equal layers compute once."""
        return {}


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding that pairs channel i of a head with channel i + D/2 (arXiv:2104.09864).

    `direction` is the sign of the angles: -1 as in nanochat, +1 as in Llama. Attention depends only on position
    differences, so the sign matters only for imported weights.
    """

    base: float = 10_000.0  # Base of the wavelengths.
    direction: int = -1  # Sign of the angles.


class Rotary(Encoding):
    def rotate(self, x_BTHD: jax.Array, context: Context) -> jax.Array:
        """Rotates each pair (x[i], x[i + D/2]) by its angle."""
        cos, sin = context.shared[self.key(self.config, x_BTHD.shape[-1])]
        first, second = jnp.split(x_BTHD, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    @classmethod
    def share(cls, config: Any, head_dim: int, context: Context, dtype: Any) -> dict[Any, Any]:
        """Cosine and sine of direction * position * base^(-2i/D), each (B, T, 1, D/2); angles in float32."""
        wide = jnp.promote_types(dtype, jnp.float32)
        frequency_D = cls.frequencies(config, head_dim, wide)
        angle = context.positions_BT[:, :, None, None].astype(wide) * frequency_D[None, None, None] * config.direction
        return {cls.key(config, head_dim): (jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype))}

    @staticmethod
    def frequencies(config: RoPE, head_dim: int, dtype: Any) -> jax.Array:
        """The angle of each pair per position, (D/2,)."""
        return config.base ** (-jnp.arange(head_dim // 2, dtype=dtype) / (head_dim // 2))

    @staticmethod
    def key(config: Any, head_dim: int) -> str:
        """The key in `Context.shared`; a string, because JAX sorts dictionary keys."""
        return f"{config} {head_dim}"


POSITIONS: dict[type, type[Encoding]] = {RoPE: Rotary, type(None): Encoding}
if TYPE_CHECKING:
    Positions = Any
else:
    Positions = functools.reduce(operator.or_, POSITIONS)


def encodings(mixers: Iterable[Any], static: Static) -> list[Encoding]:
    """The distinct encodings of some mixers; each has the name of its parameters outside the layers."""
    configs = dict.fromkeys(getattr(mixer, "positions", None) for mixer in mixers)
    return [POSITIONS[type(config)](config, static, name=f"positions_{i}") for i, config in enumerate(configs)]


def positions_within(tokens_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """Each token's index within its segment (within its row without segments), (B, T)."""
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    if segments_BT is None:
        return index_BT
    starts_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts_BT = jnp.pad(starts_BT, ((0, 0), (1, 0)), constant_values=True)
    return index_BT - jax.lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1)
