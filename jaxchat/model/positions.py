"""Position encodings; `POSITIONS` maps a configuration type to its module, None to one that does nothing.

A mixer's field `positions` chooses its encoding. A module overrides those methods of `Encoding` that it needs: it may
change the embedding, rotate queries and keys, or add a bias to the scores.
"""

import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxchat.model.dense import Bias
from jaxchat.model.layers import look_up
from jaxchat.model.part import Context, Static, param


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

    def bias(self, heads: int) -> Bias:
        """The bias of the scores: a function of positions of queries (B, T) and keys (B, S) to (B, H, T, S), where B
        may be 1. Positions are -1 where there is no token."""
        raise NotImplementedError

    @property
    def score_factor(self) -> float:
        """Factor of the scores, besides 1 / sqrt(head size)."""
        return 1.0

    @staticmethod
    def share(config: Any, head_dim: int, context: Context, dtype: Any) -> dict[Any, Any]:
        """Values for `Context.shared`, which equal layers compute once."""
        return {}

    @staticmethod
    def most_positions(config: Any) -> int | None:
        """The number of positions that there are; None for any number."""
        return None

    @staticmethod
    def check(config: Any, head_dim: int) -> None:
        """Raises ValueError if the encoding does not suit heads of this size."""


def _check_positive(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is not positive and finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be positive and finite")


@dataclass(frozen=True)
class Linear:
    """All positions divided by a factor (arXiv:2306.15595)."""

    factor: float  # Number of times that the context is longer than in training.
    amplitude = scores = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "factor")

    def scaled(self, frequency: jax.Array, base: float) -> jax.Array:
        return frequency / self.factor


@dataclass(frozen=True)
class Llama3:
    """Long wavelengths divided by a factor, short ones kept, those between interpolated (arXiv:2407.21783)."""

    factor: float = 8.0  # Number of times that the context is longer than in training.
    low: float = 1.0  # Wavelengths longer than length / low are divided.
    high: float = 4.0  # Wavelengths shorter than length / high are kept.
    length: int = 8192  # Context in training.
    amplitude = scores = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "low", "length")
        if not self.low < self.high < math.inf:
            raise ValueError(f"high={self.high} must be finite and more than low={self.low}")

    def scaled(self, frequency: jax.Array, base: float) -> jax.Array:
        turns = self.length * frequency / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


@dataclass(frozen=True)
class YaRN:
    """Frequencies of few turns in the context divided by a factor, with a ramp by channel (arXiv:2309.00071)."""

    factor: float  # Number of times that the context is longer than in training.
    length: int  # Context in training.
    fast: float = 32.0  # Channels of more turns in `length` are kept.
    slow: float = 1.0  # Channels of fewer turns are divided.
    attention: float | None = None  # Factor of cosine and sine; None for 0.1 ln(factor) + 1.
    whole: bool = True  # Round the ends of the ramp to whole channels.
    scores: float = 1.0  # Factor of the scores; DeepSeek's is (0.1 mscale_all_dim ln(factor) + 1)^2.

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "length", "slow", "scores")
        if not self.slow < self.fast < math.inf:
            raise ValueError(f"fast={self.fast} must be finite and more than slow={self.slow}")

    @property
    def amplitude(self) -> float:
        plain = 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0
        return plain if self.attention is None else self.attention

    def scaled(self, frequency: jax.Array, base: float) -> jax.Array:
        half = frequency.shape[0]
        first, last = (
            half * math.log(self.length / (n * 2 * math.pi)) / math.log(base) for n in (self.fast, self.slow)
        )
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        last = first + 0.001 if first == last else last
        divided = jnp.clip((jnp.arange(half, dtype=frequency.dtype) - first) / (last - first), 0, 1)
        return frequency / self.factor * divided + frequency * (1 - divided)


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding that pairs channel i of a head with channel i + D/2 (arXiv:2104.09864).

    `direction` is the sign of the angles: -1 as in nanochat, +1 as in Llama. Attention depends only on position
    differences, so the sign matters only for imported weights.
    """

    base: float = 10_000.0  # Base of the wavelengths.
    direction: int = -1  # Sign of the angles.
    scaling: Linear | Llama3 | YaRN | None = None  # Changes the frequencies for a context longer than in training.
    share: float = 1.0  # Share of a head's channels that is rotated; the others, which are last, are left.
    interleaved: bool = False  # Pair channels 2i and 2i + 1 instead, as GPT-J does.

    def __post_init__(self) -> None:
        _check_positive(self, "base")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be positive and at most 1")


class Rotary(Encoding):
    @property
    def score_factor(self) -> float:
        """That of the scaling."""
        return 1.0 if self.config.scaling is None else self.config.scaling.scores

    def rotate(self, x_BTHD: jax.Array, context: Context) -> jax.Array:
        """Rotates each pair of the first channels by its angle: (x[i], x[i + D/2]), or (x[2i], x[2i + 1])."""
        c, D = self.config, x_BTHD.shape[-1]
        cos, sin = context.shared[self.key(c, D)]
        rest = x_BTHD[..., 2 * cos.shape[-1] :]
        x_BTHD = x_BTHD[..., : 2 * cos.shape[-1]]
        pairs = (x_BTHD[..., ::2], x_BTHD[..., 1::2]) if c.interleaved else jnp.split(x_BTHD, 2, axis=-1)
        first, second = pairs
        turned = [first * cos - second * sin, second * cos + first * sin]
        if c.interleaved:
            return jnp.concatenate([jnp.stack(turned, axis=-1).reshape(x_BTHD.shape), rest], axis=-1)
        return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)

    @classmethod
    def share(cls, config: Any, head_dim: int, context: Context, dtype: Any) -> dict[Any, Any]:
        """Cosine and sine of direction * position * frequency, each (B, T, 1, D/2); angles in float32."""
        wide = jnp.promote_types(dtype, jnp.float32)
        frequency_D = cls.frequencies(config, head_dim, wide)
        angle = context.positions_BT[:, :, None, None].astype(wide) * frequency_D[None, None, None] * config.direction
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        if config.scaling is not None and config.scaling.amplitude != 1:
            cos, sin = cos * config.scaling.amplitude, sin * config.scaling.amplitude
        return {cls.key(config, head_dim): (cos.astype(dtype), sin.astype(dtype))}

    @staticmethod
    def check(config: RoPE, head_dim: int) -> None:
        """The share that is rotated has to be pairs."""
        if int(head_dim * config.share) % 2 or int(head_dim * config.share) < 2:
            raise ValueError(f"share={config.share} of head_dim={head_dim} channels is not a number of pairs")

    @staticmethod
    def frequencies(config: RoPE, head_dim: int, dtype: Any) -> jax.Array:
        """The angle of each pair per position, (D/2,): base^(-2i/D) before scaling, where D counts rotated channels."""
        half = int(head_dim * config.share) // 2
        frequency = config.base ** (-jnp.arange(half, dtype=dtype) / half)
        return frequency if config.scaling is None else config.scaling.scaled(frequency, config.base)

    @staticmethod
    def key(config: Any, head_dim: int) -> str:
        """The key in `Context.shared`; a string, because JAX sorts dictionary keys."""
        return f"{config} {head_dim}"


@dataclass(frozen=True)
class Learned:
    """A learned vector for each position, added to the embedding (GPT-2)."""

    length: int  # Number of positions.
    std: float = 0.02  # Standard deviation of the initial vectors.

    def __post_init__(self) -> None:
        _check_positive(self, "length")


class LearnedPositions(Encoding):
    @nn.compact
    def embed(self, x_BTM: jax.Array, positions_BT: jax.Array) -> jax.Array:
        axes, shape = ("length", "embed"), (self.config.length, self.static.width)
        table_SM = param(self, "table", axes, shape, nn.initializers.normal(self.config.std), group="embed")
        return x_BTM + look_up(table_SM, jnp.maximum(positions_BT, 0), axes, x_BTM.dtype)

    @staticmethod
    def most_positions(config: Learned) -> int | None:
        return config.length


@dataclass(frozen=True)
class Sinusoidal:
    """Sines and then cosines of the position, added to the embedding (arXiv:1706.03762, with the layout and wavelengths
    of tensor2tensor: from 2 pi to 2 pi base)."""

    base: float = 10_000.0  # Ratio of the longest wavelength to the shortest.
    offset: int = 0  # Added to positions; fairseq's models begin at 2.


class SinusoidalPositions(Encoding):
    def embed(self, x_BTM: jax.Array, positions_BT: jax.Array) -> jax.Array:
        c, M, wide = self.config, x_BTM.shape[-1], jnp.promote_types(x_BTM.dtype, jnp.float32)
        frequency = c.base ** (-jnp.arange(M // 2, dtype=wide) / max(M // 2 - 1, 1))
        angle = (positions_BT + c.offset)[..., None].astype(wide) * frequency[None, None]
        waves_BTM = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        return x_BTM + jnp.pad(waves_BTM, ((0, 0), (0, 0), (0, M % 2))).astype(x_BTM.dtype)


@dataclass(frozen=True)
class ALiBi:
    """Scores less a slope per head times the distance (arXiv:2108.12409); of H heads, head i has 2^(-bias_max i / H).

    If H is not a power of two, `order` chooses among the slopes of the next powers, as Bloom or as MPT does.
    """

    bias_max: float = 8.0  # Negative logarithm, base 2, of the least slope.
    order: Literal["bloom", "mpt"] = "bloom"  # Slopes where the number of heads is not a power of two.

    def slopes(self, heads: int) -> np.ndarray:
        """The slope of each head, (H,)."""
        below, above = (2 ** round_(math.log2(heads)) for round_ in (math.floor, math.ceil))
        more = 2.0 ** (-self.bias_max / above * np.arange(1, above + 1))
        if self.order == "mpt":
            return (more if above == heads else np.concatenate([more[1::2], more[::2]]))[:heads]
        return np.concatenate([2.0 ** (-self.bias_max / below * np.arange(1, below + 1)), more[::2]])[:heads]


class LinearBias(Encoding):
    biased = True

    def bias(self, heads: int) -> Bias:
        slope_1H11 = jnp.asarray(self.config.slopes(heads))[None, :, None, None]
        return lambda q_BT, k_BS: -slope_1H11 * (q_BT[:, None, :, None] - k_BS[:, None, None, :])


@dataclass(frozen=True)
class T5Buckets:
    """A learned bias for each bucket of distances and each head of a layer (arXiv:1910.10683).

    Half of the buckets hold one distance each; the others grow with the logarithm, and the last holds all distances
    from `longest` on. T5 itself has one table for all layers; here every layer has its own.
    """

    buckets: int = 32  # Number of buckets.
    longest: int = 128  # Distances from here on share a bucket.

    def __post_init__(self) -> None:
        if not 2 <= self.buckets <= self.longest:
            raise ValueError(f"buckets={self.buckets} must lie between 2 and longest={self.longest}")

    def of_distance(self) -> np.ndarray:
        """The bucket of each distance from 0 to `longest`."""
        distance, exact = np.arange(self.longest + 1), self.buckets // 2
        growth = np.log(np.maximum(distance, 1) / exact) / math.log(self.longest / exact)
        large = exact + (growth * (self.buckets - exact)).astype(int)
        return np.where(distance < exact, distance, np.minimum(large, self.buckets - 1))


class BucketBias(Encoding):
    biased = True

    @nn.compact
    def bias(self, heads: int) -> Bias:
        c, normal = self.config, nn.initializers.normal(0.02)
        table_NH = param(self, "table", ("buckets", "heads"), (c.buckets, heads), normal, group="scalars")
        bias_SH = table_NH[c.of_distance()]

        def bias(q_BT: jax.Array, k_BS: jax.Array) -> jax.Array:
            distance_BTS = jnp.clip(q_BT[:, :, None] - k_BS[:, None, :], 0, c.longest)
            return bias_SH[distance_BTS].transpose(0, 3, 1, 2)

        return bias


POSITIONS: dict[type, type[Encoding]] = {
    RoPE: Rotary,
    Learned: LearnedPositions,
    Sinusoidal: SinusoidalPositions,
    ALiBi: LinearBias,
    T5Buckets: BucketBias,
    type(None): Encoding,
}
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
