"""Samples the next token. Every sampling parameter is an array with one entry per row of the batch.

Order: logit bias, repetition penalty, presence and frequency penalties, temperature, then `FILTERS`. Thresholds are
found by bisection over the bits of the logits, not by sorting the vocabulary.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import sharding
from jaxchat.errors import UserError
from jaxchat.model.part import TINY

# What a compiled step supports: greedy decoding only; temperature as well; or also penalties and filters, the slowest.
Level = Literal["greedy", "plain", "full"]
LEVELS: tuple[Level, ...] = ("greedy", "plain", "full")

PRESETS: Mapping[str, Mapping[str, float]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "course": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
}

# Limits of penalties and rewards: products of two of them, and sums of squares, are still finite in float32.
LARGEST, SMALLEST = 1e15, 1e-15

TOP = 20  # Number of the most likely tokens that a compiled step returns on demand; the most that OpenAI's API has.

_BITS_PER_PASS = {"cpu": 1}  # Threshold bits found per pass over the vocabulary; 4 on accelerators to save passes.


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """Parameters of the filters that truncate the distribution; each field is a row of `FILTERS`."""

    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability (arXiv:1904.09751); 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one (arXiv:2407.01082); 0 keeps all."""

    @property
    def truncates(self) -> bool:
        """Whether any filter is on."""
        return any(getattr(self, name) != row.off for name, row in FILTERS.items())

    @property
    def truncation(self) -> dict[str, Any]:
        """Filter parameters by name."""
        return {name: getattr(self, name) for name in FILTERS}


@dataclass(frozen=True)
class SamplingParams(Truncation):
    """Sampling parameters and stop conditions of a request.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the answer
            (arXiv:1909.05858); 1 turns it off.
        presence_penalty: subtracted from the logits of tokens that occur in the answer.
        frequency_penalty: subtracted from a token's logit once per occurrence in the answer.
        logit_bias: added to the logits, by token id.
        max_tokens: length limit of the answer.
        seed: the noise is determined by seed, sample index and position alone.
        stop: texts at which the answer ends; they are not part of it.
        stop_tokens: tokens at which the answer ends, in addition to the tokenizer's end tokens.
        ignore_end: do not stop at the tokenizer's end tokens.
    """

    temperature: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 128
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_end: bool = False

    def __post_init__(self) -> None:
        for name, least, most, meaning in (
            ("temperature", 0, LARGEST, f"a number from 0 (greedy) to {LARGEST:g}"),
            *((name, *row.limits, row.meaning) for name, row in FILTERS.items()),
            ("repetition_penalty", SMALLEST, LARGEST, f"from {SMALLEST:g} to {LARGEST:g}; 1 turns it off"),
            ("presence_penalty", -LARGEST, LARGEST, f"from -{LARGEST:g} to {LARGEST:g}"),
            ("frequency_penalty", -LARGEST, LARGEST, f"from -{LARGEST:g} to {LARGEST:g}"),
            ("max_tokens", 1, math.inf, "at least 1"),
            ("seed", 0, 2**63 - 1, "from 0 to 2^63 - 1"),
        ):
            value = getattr(self, name)
            if not _finite(value) or not least <= value <= most:
                raise UserError(f"{name}={value} must be {meaning}")
            whole = name in _WHOLE or (name in FILTERS and FILTERS[name].dtype == np.int32)
            if whole and not isinstance(value, numbers.Integral):
                raise UserError(f"{name}={value} must be a whole number, {meaning}")
        biases = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else [(None, None)]
        if not all(_whole(token) and _finite(value) and abs(value) <= LARGEST for token, value in biases):
            raise UserError(
                f"logit_bias={self.logit_bias!r} must map token ids to numbers from -{LARGEST:g} to {LARGEST:g}"
            )
        if not _listed(self.stop) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop={self.stop!r} must be a list of non-empty texts")
        if not _listed(self.stop_tokens) or not all(map(_whole, self.stop_tokens)):
            raise UserError(f"stop_tokens={self.stop_tokens!r} must be a list of token ids")

    @property
    def penalised(self) -> bool:
        """Whether penalties or a logit bias change the logits."""
        return bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or len(self.logit_bias)
        )

    @property
    def level(self) -> Level:
        """The cheapest level of a compiled step that can serve this request."""
        if self.penalised or (self.temperature and self.truncates):
            return "full"
        return "plain" if self.temperature else "greedy"


_WHOLE = ("max_tokens", "seed")


def _finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


class SamplingRows(NamedTuple):
    """Sampling parameters per row, arrays of shape (B,). The seed comes in two halves; `sample` is the sample index."""

    temperature: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    seed_low: Any
    seed_high: Any
    sample: Any
    filters: Mapping[str, Any]


class History(NamedTuple):
    """Inputs of the penalties, (B, V): whether a token is in the prompt, its count in the answer, its logit bias."""

    prompt_BV: Any
    counts_BV: Any
    bias_BV: Any


class Choice(NamedTuple):
    """One token per row, (B,), and its log-probability under the model and under the sampling distribution.

    If requested, also the support of the distribution: (B, ceil(V / 8)) uint8, one bit per token, lowest bit first; and
    the most likely tokens under the model with their log-probabilities, most likely first, (B, min(TOP, V)).
    """

    token_B: Any
    logprob_B: Any
    sampling_logprob_B: Any
    support_BC: Any = None
    top_token_BK: Any = None
    top_logprob_BK: Any = None


def beginning(asked: Sequence[tuple[Sequence[int], SamplingParams]], *, rows: int, vocab: int) -> History:
    """Inputs of the penalties at the start of an answer, as NumPy arrays with one row per request, padded to `rows`."""
    prompt_BV, bias_BV = np.zeros((rows, vocab), bool), np.zeros((rows, vocab), np.float32)
    for row, (prompt, params) in enumerate(asked):
        prompt_BV[row, list(prompt)] = True
        for token, value in params.logit_bias.items():
            bias_BV[row, token] = value
    return History(prompt_BV, np.zeros((rows, vocab), np.int32), bias_BV)


def pack(requests: Sequence[tuple[SamplingParams, int]]) -> SamplingRows:
    """Converts (parameters, sample index) pairs to arrays, one row per pair."""
    params = [p for p, _ in requests]
    columns: dict[str, Any] = {
        name: np.array([getattr(p, name) for p in params], np.float32) for name in SamplingRows._fields[:4]
    }
    columns["filters"] = {
        name: np.array([min(getattr(p, name), 2**31 - 1) for p in params], row.dtype) for name, row in FILTERS.items()
    }
    columns["seed_low"] = np.array([p.seed & 0xFFFFFFFF for p in params], np.uint32)
    columns["seed_high"] = np.array([p.seed >> 32 for p in params], np.uint32)
    columns["sample"] = np.array([sample for _, sample in requests], np.uint32)
    return SamplingRows(**columns)


def noise(rows: SamplingRows, position_B: jax.Array, size: int) -> jax.Array:
    """Uniform noise in (0, 1), float32 (B, size), determined by (seed, sample index, position) alone, so that a sample
    does not depend on its neighbours.
    """

    def of(low: jax.Array, high: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.key(0)
        for part in (low, high, sample, position):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key, (size,), jnp.float32, minval=jnp.finfo(jnp.float32).tiny)

    return jax.vmap(of)(rows.seed_low, rows.seed_high, rows.sample, position_B)


def choose(
    logits_BV: jax.Array,
    rows: SamplingRows,
    position_B: jax.Array,
    *,
    level: Level,
    history: History | None = None,
    return_support: bool = False,
    return_top: bool = False,
) -> Choice:
    """Chooses one token per row: the most likely one at temperature 0, otherwise a sample (by the Gumbel-max trick).

    `position_B` is the position of the previous token. `level` must cover every row; a row's token does not depend on
    it. `return_support` has no effect at level "greedy". `history` is needed if a row has penalties.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    top = most_likely(logits_BV) if return_top else (None, None)
    if level == "greedy":
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        zero_B = jnp.zeros(logits_BV.shape[:1], jnp.float32)
        return Choice(token_B, logprob(logits_BV, token_B), zero_B, None, *top)
    penalised_BV = logits_BV
    if level == "full" and history is not None:
        penalised_BV = penalise(logits_BV, rows, history)
    greedy_B = rows.temperature == 0
    z_BV = warm(penalised_BV, rows)
    if level == "full":
        z_BV = truncate(z_BV, rows.filters)
    gumbel_BV = -jnp.log(-jnp.log(noise(rows, position_B, z_BV.shape[1])))
    sample_B = jnp.argmax(z_BV + gumbel_BV, axis=-1)
    token_B = jnp.where(greedy_B, jnp.argmax(penalised_BV, axis=-1), sample_B).astype(jnp.int32)
    sampling_B = jnp.where(greedy_B, 0.0, logprob(z_BV, token_B))
    support_BC = jnp.packbits(jnp.isfinite(z_BV), axis=-1, bitorder="little") if return_support else None
    return Choice(token_B, logprob(logits_BV, token_B), sampling_B, support_BC, *top)


def warm(logits_BV: jax.Array, rows: SamplingRows) -> jax.Array:
    """Logits divided by the temperature; rows of temperature 0 are left as they are."""
    return logits_BV / jnp.where(rows.temperature == 0, 1.0, jnp.maximum(rows.temperature, 1e-6))[:, None]


def logprob(z_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """log softmax(z) of one token per row, (B,)."""
    at_B = jnp.take_along_axis(z_BV, token_B[:, None], axis=-1)[:, 0]
    return at_B - jax.nn.logsumexp(z_BV, axis=-1)


def most_likely(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The TOP most likely tokens per row, or all of a smaller vocabulary, and their log-probabilities, (B, K)."""
    best_BK, token_BK = jax.lax.top_k(logits_BV, min(TOP, logits_BV.shape[-1]))
    return token_BK.astype(jnp.int32), best_BK - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)


def penalise(logits_BV: jax.Array, rows: SamplingRows, history: History) -> jax.Array:
    """Logits after bias, repetition, presence and frequency penalties."""
    z_BV = logits_BV + history.bias_BV
    answered_BV = history.counts_BV > 0
    repetition_B1 = rows.repetition_penalty[:, None]
    repeated_BV = jnp.where(z_BV > 0, z_BV / repetition_B1, z_BV * repetition_B1)
    z_BV = jnp.where(history.prompt_BV | answered_BV, repeated_BV, z_BV)
    return z_BV - rows.presence_penalty[:, None] * answered_BV - rows.frequency_penalty[:, None] * history.counts_BV


def truncate(z_BV: jax.Array, filters: Mapping[str, jax.Array]) -> jax.Array:
    """Sets the logits of tokens that a filter removes to -inf; `filters` has parameters per row, (B,), by name."""
    for name, row in FILTERS.items():  # Not in the order of `filters`: JAX sorts the keys of a dictionary.
        if name in filters:
            z_BV = row.apply(z_BV, filters[name])
    return z_BV


def keep_top_k(z_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """Sets all but the k most likely tokens to -inf. Ties with the k-th are kept; k = 0 keeps all."""
    order_BV, V = _order(z_BV), z_BV.shape[-1]
    k_B1 = jnp.where(k_B > 0, jnp.minimum(k_B, V), V)[:, None]
    return jnp.where(order_BV >= _largest(order_BV, jnp.ones_like(order_BV), k_B1), z_BV, -jnp.inf)


def keep_top_p(z_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Sets all but the smallest set of tokens with probability at least p to -inf; ties with the last are kept."""
    order_BV, p_B1 = _order(z_BV), p_B[:, None]
    least_B1 = jnp.where(p_B1 >= 1, 0, _largest(order_BV, jax.nn.softmax(z_BV, axis=-1), p_B1))
    return jnp.where(order_BV >= least_B1, z_BV, -jnp.inf)


def keep_min_p(z_BV: jax.Array, p_B: jax.Array) -> jax.Array:
    """Sets tokens less likely than p times the most likely one to -inf."""
    least_B1 = jnp.max(z_BV, axis=-1, keepdims=True) + jnp.log(p_B)[:, None]
    return jnp.where(z_BV >= least_B1, z_BV, -jnp.inf)


class Filter(NamedTuple):
    """A way to truncate the distribution: `apply` sets logits (B, V) to -inf, given a parameter (B,).

    `off`: parameter that keeps every token. `limits`: valid range. `meaning`: the range in words, for error messages.
    """

    apply: Callable[[jax.Array, jax.Array], jax.Array]
    off: float
    limits: tuple[float, float]
    meaning: str
    dtype: Any = np.float32


# In order of application.
FILTERS: Mapping[str, Filter] = {
    "top_k": Filter(keep_top_k, 0, (0, math.inf), "at least 0 (0 keeps every token)", np.int32),
    "top_p": Filter(keep_top_p, 1, (TINY, 1), f"from {TINY:.3g} to 1 (1 keeps every token)"),
    "min_p": Filter(keep_min_p, 0, (0, 1), "from 0 to 1"),
}


def _order(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 and preserves the order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(order_BV: jax.Array, weight_BV: jax.Array, least_B1: jax.Array) -> jax.Array:
    """The largest threshold t, (B, 1), such that tokens with order >= t have a total weight of at least `least_B1`."""
    bits = _BITS_PER_PASS.get(sharding.platform(), 4)
    digit_J = jnp.arange(1, 1 << bits, dtype=jnp.uint32)

    def refine(i: jax.Array, threshold_B1: jax.Array) -> jax.Array:
        shift = (32 - bits * (i + 1)).astype(jnp.uint32)
        tried_BJ = threshold_B1 + (digit_J[None] << shift)
        above_BJV = order_BV[:, None] >= tried_BJ[:, :, None]
        weight_BJ = jnp.sum(jnp.where(above_BJV, weight_BV[:, None], 0), axis=-1)
        return threshold_B1 + (jnp.sum(weight_BJ >= least_B1, axis=1, keepdims=True).astype(jnp.uint32) << shift)

    return jax.lax.fori_loop(0, 32 // bits, refine, jnp.zeros((order_BV.shape[0], 1), jnp.uint32))
