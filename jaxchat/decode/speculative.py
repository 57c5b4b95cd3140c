"""Speculative decoding: guess several tokens, process them in one call, and accept those that the model samples too.

The target model samples at every guessed position with the noise that it would use there without speculation; a guess
is accepted if it equals that sample. So a request gets the same tokens with or without speculation, greedy or not,
wherever the guesses come from (drafter-invariant speculation, arXiv:2408.07978). A deterministic guess, such as a
lookup, is accepted with its probability under the target, which is optimal (arXiv:2211.17192). A draft model samples
with the target's noise; its guess is accepted with probability at least (1 - d) / (1 + d), where d is the total
variation distance of the two distributions. The optimum is 1 - d.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.decode.programs import DecodeState, shard_cache
from jaxchat.decode.sampling import Choice, Level, SamplingRows, choose
from jaxchat.model.transformer import Cache, Params, Transformer


@dataclass(frozen=True)
class Speculation:
    """Settings of speculative decoding.

    Attributes:
        tokens: guessed tokens per call.
        ngram: a lookup guesses the tokens that followed the latest earlier occurrence of the last `ngram` tokens.
        rounds: calls per dispatch.
        least: mean number of accepted guesses per call below which speculation pauses for some dispatches.
    """

    tokens: int = 7
    ngram: int = 3
    rounds: int = 4
    least: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tokens", "ngram", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"speculation {name}={getattr(self, name)} must be at least 1")


class AcceptanceTracker:
    """Pauses speculation while guesses are rarely accepted.

    Averages accepted guesses per call over recent dispatches. If the average is below `least`, speculation pauses for
    `FIRST_REST` dispatches, then twice as many each time that it fails again, up to `LONGEST_REST`.
    """

    FIRST_REST, LONGEST_REST = 4, 64

    def __init__(self, least: float) -> None:
        self._least, self._recent, self._rest, self._next_rest = least, least, 0, self.FIRST_REST

    def wants(self) -> bool:
        """Whether to speculate in this dispatch; call it once per dispatch."""
        self._rest -= self._rest > 0
        return not self._rest

    def note(self, accepted: float) -> None:
        """Records the mean number of accepted guesses per call of a dispatch."""
        self._recent = (self._recent + accepted) / 2
        if self._recent >= self._least:
            self._next_rest = self.FIRST_REST
        else:
            self._rest, self._recent = self._next_rest + 1, self._least
            self._next_rest = min(2 * self._next_rest, self.LONGEST_REST)


def repeats(text: np.ndarray, ngram: int) -> bool:
    """Whether the last `ngram` tokens of a text also occur earlier in it."""
    if len(text) <= ngram:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(text, ngram)
    return bool((windows[:-1] == windows[-1]).all(axis=1).any())


class Round(NamedTuple):
    """State between calls: last token, its position, whether the row is paused, caches, tokens by position."""

    token_B: jax.Array
    position_B: jax.Array
    paused_B: jax.Array
    cache: Cache
    draft_cache: Cache | None
    text_BL: jax.Array


def lookup(text_BL: jax.Array, position_B: jax.Array, *, ngram: int, tokens: int) -> jax.Array:
    """Guesses the tokens that followed the latest earlier occurrence of the last `ngram` tokens, (B, D); -1 if none.

    `text_BL` holds each row's tokens by position. A guess that reaches the end of the text repeats from its start.
    """
    index_L = jnp.arange(text_BL.shape[1], dtype=jnp.int32)[None]
    position_B1 = position_B[:, None]
    same_BL = (index_L >= ngram - 1) & (index_L < position_B1)
    for back in range(ngram):
        last_B1 = jnp.take_along_axis(text_BL, jnp.maximum(position_B1 - back, 0), axis=1)
        same_BL &= jnp.roll(text_BL, back, axis=1) == last_B1
    match_B1 = jnp.max(jnp.where(same_BL, index_L, -1), axis=1, keepdims=True)
    step_D = jnp.arange(tokens, dtype=jnp.int32)[None] % jnp.maximum(position_B1 - match_B1, 1)
    guess_BD = jnp.take_along_axis(text_BL, match_B1 + 1 + step_D, axis=1)
    return jnp.where(match_B1 >= 0, guess_BD, -1)


def guess(
    transformer: Transformer, params: Params, rows: SamplingRows, at: Round, *, tokens: int, level: Level
) -> tuple[jax.Array, Cache | None]:
    """Guesses tokens with the draft model, (B, D), sampled with the target's noise; returns them and its cache."""

    def step(carry: Any, _: None) -> Any:
        token_B, position_B, cache = carry
        where_B1 = jnp.where(at.paused_B, -1, position_B)[:, None]
        forward = transformer.apply(params, token_B[:, None], positions_BT=where_B1, cache=cache)
        choice = choose(transformer.logits(params, forward.hidden)[:, 0], rows, position_B, level=level)
        return (choice.token_B, position_B + 1, forward.cache), choice.token_B

    start = (at.token_B, at.position_B, at.draft_cache)
    (_, _, cache), guess_DB = jax.lax.scan(step, start, None, length=tokens + 1)  # The last step only fills the cache.
    return guess_DB[:-1].T, cache


def verify(
    transformer: Transformer,
    params: Params,
    rows: SamplingRows,
    running: DecodeState,
    at: Round,
    guess_BD: jax.Array,
    *,
    level: Level,
) -> tuple[Round, Choice]:
    """Processes the last token and the guesses in one call; appends the accepted guesses and one more token per row."""
    B, T = guess_BD.shape[0], guess_BD.shape[1] + 1
    step_T = jnp.arange(T, dtype=jnp.int32)[None]
    tokens_BT = jnp.concatenate([at.token_B[:, None], guess_BD], axis=1)
    positions_BT = at.position_B[:, None] + step_T
    read_BT = (tokens_BT >= 0) & (positions_BT < running.limit_B[:, None]) & ~at.paused_B[:, None]
    hidden_BTM, cache, _, _ = transformer.apply(
        params, jnp.maximum(tokens_BT, 0), positions_BT=jnp.where(read_BT, positions_BT, -1), cache=at.cache
    )
    assert cache is not None
    logits_XV = transformer.logits(params, hidden_BTM).reshape(B * T, -1)
    rows_X = jax.tree.map(lambda column: jnp.repeat(column, T), rows)
    choice = choose(logits_XV, rows_X, positions_BT.reshape(B * T), level=level)
    chosen_BT, logprob_BT, sampling_logprob_BT = (x.reshape(B, T) for x in choice[:3])
    accepted_BD = jnp.cumprod((chosen_BT[:, :-1] == guess_BD) & read_BT[:, 1:], axis=1)
    stop_BT = jnp.any(chosen_BT[:, :, None] == running.stops_BN[:, None], axis=2)
    first_B = jnp.argmax(jnp.pad(stop_BT, ((0, 0), (0, 1)), constant_values=True), axis=1)  # T without a stop token.
    room_B = running.limit_B - at.position_B
    count_B = jnp.minimum(jnp.minimum(jnp.sum(accepted_BD, axis=1) + 1, first_B + 1), room_B)
    count_B = jnp.where(at.paused_B, 0, count_B).astype(jnp.int32)
    last_B1 = jnp.maximum(count_B - 1, 0)[:, None]
    token_B = jnp.where(at.paused_B, at.token_B, jnp.take_along_axis(chosen_BT, last_B1, axis=1)[:, 0])
    before_B = jnp.take_along_axis(tokens_BT, last_B1, axis=1)[:, 0]
    position_B = at.position_B + count_B
    stopped_B = jnp.any(stop_BT & (step_T < count_B[:, None]), axis=1) | (position_B >= running.limit_B)
    output_BT = jnp.where(step_T < count_B[:, None], chosen_BT, -1)
    slot_BT = jnp.where(output_BT >= 0, positions_BT + 1, at.text_BL.shape[1])
    text_BL = at.text_BL.at[jnp.arange(B)[:, None], slot_BT].set(output_BT, mode="drop")

    def shorten(cache: Cache) -> Cache:
        """Sets the length of a cache back to the accepted tokens; the next call overwrites the rejected ones."""
        length_B = jnp.where(at.paused_B, cache.length_B, position_B)
        return cache._replace(length_B=length_B, last_B=jnp.where(at.paused_B, cache.last_B, before_B))

    draft_cache = None if at.draft_cache is None else shorten(at.draft_cache)
    after = Round(token_B, position_B, at.paused_B | stopped_B, shorten(cache), draft_cache, text_BL)
    return after, Choice(output_BT, logprob_BT, sampling_logprob_BT)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4), static_argnames=("settings", "level"))
def speculate(
    transformer: Transformer,
    draft: Transformer | None,
    params: Params,
    cache: Cache,
    draft_cache: Cache | None,
    running: DecodeState,
    rows: SamplingRows,
    text_BL: jax.Array,
    draft_params: Params | None,
    *,
    settings: Speculation,
    level: Level,
) -> tuple[Cache, Cache | None, Choice]:
    """Runs `rounds` calls of guessing and verification; returns choices (rounds, B, tokens + 1), token -1 for none."""

    def turn(at: Round, _: None) -> tuple[Round, Choice]:
        if draft is None or draft_params is None:
            guess_BD = lookup(at.text_BL, at.position_B, ngram=settings.ngram, tokens=settings.tokens)
        else:
            guess_BD, drafted = guess(draft, draft_params, rows, at, tokens=settings.tokens, level=level)
            at = at._replace(draft_cache=drafted)
        return verify(transformer, params, rows, running, at, guess_BD, level=level)

    start = Round(running.token_B, running.position_B, running.position_B < 0, cache, draft_cache, text_BL)
    end, steps = jax.lax.scan(turn, start, None, length=settings.rounds)
    return shard_cache(end.cache), None if end.draft_cache is None else shard_cache(end.draft_cache), steps
