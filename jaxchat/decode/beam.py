"""Beam search over the engine's cache, with the length penalty and early stopping of Hugging Face transformers."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import signals
from jaxchat.decode import programs
from jaxchat.decode.engine import Engine
from jaxchat.errors import NOT_FINITE, UserError
from jaxchat.model.transformer import Cache, Params, Transformer

NEVER = -1e9  # Score of an empty place in a list of beams.


class Beam(NamedTuple):
    """A finished hypothesis: text, tokens, score."""

    text: str
    tokens: tuple[int, ...]
    score: float


class Search(NamedTuple):
    """State of a search: W unfinished (`going`) hypotheses, the best W finished (`ended`) ones, tokens (W, N) padded
    with -1, N the length of the cache, and whether the search is still open.
    """

    step: jax.Array
    logits_WV: jax.Array
    cache: Cache
    going_WN: jax.Array
    going_logprob_W: jax.Array
    ended_WN: jax.Array
    ended_score_W: jax.Array
    open: jax.Array


def beam_search(
    engine: Engine,
    prompt: Sequence[int],
    *,
    beams: int = 4,
    max_tokens: int = 128,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    stop_tokens: Sequence[int] = (),
) -> list[Beam]:
    """Returns the best answers to a prompt, best first; `UserError` if the prompt is invalid (`Engine.check`).

    Args:
        beams: number of hypotheses kept at each step, and maximum number of results.
        max_tokens: length limit of an answer.
        length_penalty: a finished hypothesis scores its log-probability divided by its length to this power.
        early_stopping: True stops once `beams` hypotheses are finished. False stops once the best unfinished one,
            scored at its current length, cannot beat the worst finished one. "never" is the same, but with a positive
            `length_penalty` scores it at the length limit.
        stop_tokens: tokens that end a hypothesis, in addition to the tokenizer's end tokens.
    """
    if beams < 1 or max_tokens < 1:
        raise UserError(f"beams={beams} and max_tokens={max_tokens} must be at least 1")
    prompt = engine.check(prompt)
    most = min(max_tokens, engine.shape.length - len(prompt))
    ends = sorted({*engine.ends, *stop_tokens})
    # Padded, so that a few stop tokens more do not compile another program.
    stops = np.array(ends + [-1] * (-len(ends) % programs.STOPS), np.int32)
    with engine.on_mesh():
        row, logits_1V = engine.read(prompt)
        first_W, none_W = np.zeros(beams, np.int32), jnp.full((beams,), NEVER, jnp.float32)
        empty = jnp.full((beams, engine.shape.length), -1, jnp.int32)
        state = Search(
            step=jnp.int32(0),
            logits_WV=jnp.repeat(logits_1V[:1], beams, axis=0),
            cache=programs.move(engine.transformer, row, first_W, length=engine.shape.length, write=1),
            going_WN=empty,
            going_logprob_W=none_W.at[0].set(0.0),
            ended_WN=empty,
            ended_score_W=none_W,
            open=jnp.bool_(True),
        )
        while bool(state.open):
            signals.check()
            arguments = (engine.transformer, engine.params, state, stops, np.int32(len(prompt)), np.int32(most))
            penalty = np.float32(length_penalty)
            state = search(*arguments, penalty, early_stopping=early_stopping, steps=engine.shape.steps)
    found = []
    for tokens_N, score in zip(*jax.device_get((state.ended_WN, state.ended_score_W))):
        if score > NEVER / 2:
            tokens = tuple(int(token) for token in tokens_N if token >= 0)
            found.append(Beam(engine.tokenizer.decode(tokens), tokens, float(score)))
    if not found:
        raise UserError(NOT_FINITE)
    return found


@functools.partial(jax.jit, static_argnums=0, static_argnames=("early_stopping", "steps"))
def search(
    transformer: Transformer,
    params: Params,
    state: Search,
    stops_E: jax.Array,
    start: jax.Array,
    limit: jax.Array,
    length_penalty: jax.Array,
    *,
    early_stopping: bool | str,
    steps: int,
) -> Search:
    """Advances every beam by `steps` tokens, or until the search is closed.

    `stops_E` are the stop tokens, `start` is the length of the prompt, `limit` that of an answer at most.
    """
    stop = state.step + steps

    def turn(state: Search) -> Search:
        at, parent_W = advance(state, stops_E, limit, length_penalty, early_stopping=early_stopping)
        token_W = at.going_WN[:, state.step]
        position_W = jnp.where(at.open, start + state.step, -1)
        cache = jax.tree.map(lambda x: x[parent_W], state.cache)
        forward = transformer.apply(
            params,
            token_W[:, None],
            positions_BT=jnp.broadcast_to(position_W, token_W.shape)[:, None].astype(jnp.int32),
            cache=cache,
        )
        assert forward.cache is not None
        return at._replace(cache=forward.cache, logits_WV=transformer.logits(params, forward.hidden)[:, 0])

    return jax.lax.while_loop(lambda state: state.open & (state.step < stop), turn, state)


def advance(
    state: Search, stops_E: jax.Array, limit: jax.Array, length_penalty: jax.Array, *, early_stopping: bool | str
) -> tuple[Search, jax.Array]:
    """Extends all beams by one token and moves finished ones to `ended`; returns the state and each beam's parent."""
    W, V = state.logits_WV.shape
    step, length = state.step, (state.step + 1).astype(jnp.float32)
    total_WV = jax.nn.log_softmax(state.logits_WV) + state.going_logprob_W[:, None]
    # Enough candidates to leave W unfinished ones even if every beam is continued by every stop token.
    logprob_C, index_C = jax.lax.top_k(total_WV.reshape(-1), min(max(2, 1 + stops_E.shape[0]) * W, W * V))
    parent_C, token_C = index_C // V, (index_C % V).astype(jnp.int32)
    text_CN = state.going_WN[parent_C].at[:, step].set(token_C)
    ends_C = jnp.any(token_C[:, None] == stops_E[None], axis=1) | (step >= limit - 1)

    going_C = jnp.where(ends_C, logprob_C + NEVER, logprob_C)
    going_W, chosen_W = jax.lax.top_k(going_C, W)

    best_C = jnp.arange(ends_C.shape[0]) < W  # As in transformers, only the first W candidates may finish.
    exists_C = logprob_C > NEVER / 2
    score_C = jnp.where(ends_C & best_C & exists_C, logprob_C / length**length_penalty, NEVER)
    score_W, index_W = jax.lax.top_k(jnp.concatenate([state.ended_score_W, score_C]), W)
    ended_WN = jnp.concatenate([state.ended_WN, text_CN])[index_W]

    final_length = jnp.where((length_penalty > 0) & (early_stopping == "never"), limit.astype(jnp.float32), length)
    ended_W = score_W > NEVER / 2
    worst_W = jnp.where(ended_W, jnp.min(score_W), NEVER)
    still_open = jnp.any(going_W[0] / final_length**length_penalty > worst_W) & ~jnp.all(ends_C)
    if early_stopping is True:
        still_open &= ~jnp.all(ended_W)

    after = state._replace(
        step=step + 1,
        going_WN=text_CN[chosen_W],
        going_logprob_W=going_W,
        ended_WN=ended_WN,
        ended_score_W=score_W,
        open=still_open,
    )
    return after, parent_C[chosen_W]
