"""Speculative decoding: guess several tokens, read them in one call, and take those that would have been chosen anyway.

The target model chooses at every guessed position with the noise it would have used there; a guess stands when it is
that choice. So a request gets the same tokens with or without speculation, from whatever guesser, greedy or drawn
(drafter-invariant speculation, arXiv:2408.07978). For guesses without chance of their own, as those looked up, a guess
stands with the probability that the target gives it, which no rule exceeds (arXiv:2211.17192); a draft model draws with
the target's noise, and is accepted with probability at least (1 - d) / (1 + d) at total variation d, where the best is
1 - d.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.decode.programs import DecodeState, StepOutputs, place
from jaxchat.decode.sampling import Level, Rows, choose
from jaxchat.model.transformer import Cache, Params, Transformer


@dataclass(frozen=True)
class Speculation:
    """How guesses are made, and when.

    Attributes:
        tokens: guesses a call.
        ngram: the guess is what followed the last time that the newest `ngram` tokens stood in the text.
        rounds: calls a dispatch.
        least: guess on while this many guesses a call were right of late; else decode plainly, and try again later.
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
    """Whether guessing pays: how many guesses a call were right of late, and a pause after bad luck that doubles."""

    FIRST_REST, LONGEST_REST = 4, 64

    def __init__(self, least: float) -> None:
        self._least, self._recent, self._rest, self._next_rest = least, least, 0, self.FIRST_REST

    def wants(self) -> bool:
        """Whether to guess in this dispatch."""
        self._rest -= self._rest > 0
        return not self._rest

    def note(self, right: float) -> None:
        """Takes the mean number of right guesses a call of a dispatch."""
        self._recent = (self._recent + right) / 2
        if self._recent >= self._least:
            self._next_rest = self.FIRST_REST
        else:
            self._rest, self._recent = self._next_rest + 1, self._least
            self._next_rest = min(2 * self._next_rest, self.LONGEST_REST)


def repeats(text: np.ndarray, ngram: int) -> bool:
    """Whether the last `ngram` tokens of a text stood in it before."""
    if len(text) <= ngram:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(text, ngram)
    return bool((windows[:-1] == windows[-1]).all(axis=1).any())


class Round(NamedTuple):
    """What changes from call to call: the newest token, its position, whether the row waits, the caches, the text."""

    token_B: jax.Array
    position_B: jax.Array
    paused_B: jax.Array
    cache: Cache
    draft_cache: Cache | None
    text_BL: jax.Array


def lookup(text_BL: jax.Array, position_B: jax.Array, *, ngram: int, tokens: int) -> jax.Array:
    """What followed the latest earlier occurrence of the newest `ngram` tokens, (B, D); -1 where there is none.

    `text_BL` holds each row's tokens by position. Where the text ends before the guess does, the guess repeats.
    """
    index_L = jnp.arange(text_BL.shape[1], dtype=jnp.int32)[None]
    position_B1 = position_B[:, None]
    same_BL = (index_L >= ngram - 1) & (index_L < position_B1)
    for back in range(ngram):
        newest_B1 = jnp.take_along_axis(text_BL, jnp.maximum(position_B1 - back, 0), axis=1)
        same_BL &= jnp.roll(text_BL, back, axis=1) == newest_B1
    found_B1 = jnp.max(jnp.where(same_BL, index_L, -1), axis=1, keepdims=True)
    step_D = jnp.arange(tokens, dtype=jnp.int32)[None] % jnp.maximum(position_B1 - found_B1, 1)
    guess_BD = jnp.take_along_axis(text_BL, found_B1 + 1 + step_D, axis=1)
    return jnp.where(found_B1 >= 0, guess_BD, -1)


def guess(
    transformer: Transformer, params: Params, rows: Rows, at: Round, *, tokens: int, level: Level
) -> tuple[jax.Array, Cache | None]:
    """The draft model's next tokens, (B, D), drawn with the target's noise, and its cache with all of them read."""

    def step(carry: Any, _: None) -> Any:
        token_B, position_B, cache = carry
        where_B1 = jnp.where(at.paused_B, -1, position_B)[:, None]
        forward = transformer.apply(params, token_B[:, None], positions_BT=where_B1, cache=cache)
        choice = choose(transformer.logits(params, forward.hidden)[:, 0], rows, position_B, level=level)
        return (choice.token_B, position_B + 1, forward.cache), choice.token_B

    start = (at.token_B, at.position_B, at.draft_cache)
    (_, _, cache), guess_DB = jax.lax.scan(step, start, None, length=tokens + 1)  # The last is read, not used.
    return guess_DB[:-1].T, cache


def verify(
    transformer: Transformer,
    params: Params,
    rows: Rows,
    running: DecodeState,
    at: Round,
    guess_BD: jax.Array,
    *,
    level: Level,
) -> tuple[Round, StepOutputs]:
    """Reads the newest token and the guesses, and moves each row on past the guesses that stand, and one more."""
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
    chosen_BT, logprob_BT, drawn_BT = (x.reshape(B, T) for x in choice[:3])
    right_BD = jnp.cumprod((chosen_BT[:, :-1] == guess_BD) & read_BT[:, 1:], axis=1)
    stop_BT = jnp.any(chosen_BT[:, :, None] == running.stops_BN[:, None], axis=2)
    room_B = running.limit_B - at.position_B
    count_B = jnp.minimum(jnp.minimum(jnp.sum(right_BD, axis=1) + 1, _first(stop_BT) + 1), room_B)
    count_B = jnp.where(at.paused_B, 0, count_B).astype(jnp.int32)
    last_B1 = jnp.maximum(count_B - 1, 0)[:, None]
    token_B = jnp.where(at.paused_B, at.token_B, jnp.take_along_axis(chosen_BT, last_B1, axis=1)[:, 0])
    before_B = jnp.take_along_axis(tokens_BT, last_B1, axis=1)[:, 0]
    position_B = at.position_B + count_B
    stopped_B = jnp.any(stop_BT & (step_T < count_B[:, None]), axis=1) | (position_B >= running.limit_B)
    given_BT = jnp.where(step_T < count_B[:, None], chosen_BT, -1)
    slot_BT = jnp.where(given_BT >= 0, positions_BT + 1, at.text_BL.shape[1])
    text_BL = at.text_BL.at[jnp.arange(B)[:, None], slot_BT].set(given_BT, mode="drop")
    draft_cache = None if at.draft_cache is None else _take_back(at.draft_cache, at.paused_B, position_B, before_B)
    cache = _take_back(cache, at.paused_B, position_B, before_B)
    after = Round(token_B, position_B, at.paused_B | stopped_B, cache, draft_cache, text_BL)
    return after, StepOutputs(given_BT, logprob_BT, drawn_BT)


def _take_back(cache: Cache, paused_B: jax.Array, length_B: jax.Array, last_B: jax.Array) -> Cache:
    """A cache without the guesses that did not stand: what it holds of them will be written again."""
    length_B, last_B = (jnp.where(paused_B, old, new) for old, new in zip(cache[1:], (length_B, last_B), strict=True))
    return cache._replace(length_B=length_B, last_B=last_B)


def speculate(
    transformer: Transformer,
    params: Params,
    cache: Cache,
    draft_cache: Cache | None,
    running: DecodeState,
    rows: Rows,
    text_BL: jax.Array,
    draft: tuple[Transformer, Params] | None,
    *,
    settings: Speculation,
    level: Level,
) -> tuple[Cache, Cache | None, StepOutputs]:
    """`rounds` calls, each with its guesses. Steps are (rounds, B, tokens + 1), -1 for no token."""

    def turn(at: Round, _: None) -> tuple[Round, StepOutputs]:
        if draft is None:
            guess_BD = lookup(at.text_BL, at.position_B, ngram=settings.ngram, tokens=settings.tokens)
        else:
            guess_BD, drafted = guess(*draft, rows, at, tokens=settings.tokens, level=level)
            at = at._replace(draft_cache=drafted)
        return verify(transformer, params, rows, running, at, guess_BD, level=level)

    start = Round(running.token_B, running.position_B, running.position_B < 0, cache, draft_cache, text_BL)
    end, steps = jax.lax.scan(turn, start, None, length=settings.rounds)
    return place(end.cache), None if end.draft_cache is None else place(end.draft_cache), steps


def _first(seen_BT: jax.Array) -> jax.Array:
    """The first index that is true, (B,), or T where none is."""
    T = seen_BT.shape[1]
    return jnp.min(jnp.where(seen_BT, jnp.arange(T)[None], T), axis=1)
