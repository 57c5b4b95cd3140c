"""Looks into a model as it reads one text: losses, candidates, attention, and what each layer would say."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.decode import explain
from jaxchat.decode.engine import Engine
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import NOT_FINITE, UserError
from jaxchat.model import trace
from jaxchat.model.attention import MIXERS
from jaxchat.model.dense import visible, weights
from jaxchat.model.trace import Attended, Trace
from jaxchat.model.transformer import Params, Transformer

LENS = 10  # Candidates that the compiled lens finds; a larger count is another program.


class View(NamedTuple):
    """A text in an engine, and the trace of its forward pass, padded at the end to a length that is compiled once."""

    engine: Engine
    ids: tuple[int, ...]
    trace: Trace


@functools.partial(jax.jit, static_argnums=0)
def _trace(transformer: Transformer, params: Params, tokens_BT: jax.Array) -> Trace:
    return trace.trace(transformer, params, tokens_BT)


def look(engine: Engine, ids: Sequence[int]) -> View:
    """Runs a text through the engine's model; raises `UserError` if it is empty, too long or has unknown ids."""
    ids, padded_1T = engine.padded(ids)
    with engine.on_mesh():
        traced = _trace(engine.transformer, engine.params, padded_1T)
    if not np.isfinite(np.asarray(traced.forward.hidden)[0, : len(ids)]).all():
        raise UserError(NOT_FINITE)
    return View(engine, ids, traced)


def losses(engine: Engine, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Loss in nats and logit of every token but the first, given those before it; `launch.chat --score` shows them."""
    return [
        {"token": token, "name": explain.name_of(engine.tokenizer, token), "loss": -logprob, "logit": logit}
        for token, logit, logprob in explain.score(engine, ids)
    ]


def candidates(
    engine: Engine, prompt: Sequence[int], answer: Sequence[int], params: SamplingParams, *, count: int = 8
) -> list[list[dict[str, Any]]]:
    """For every token of an answer, and for the one that would follow it, the candidates that `explain` finds.

    A candidate has its logit and its probability in the model, after penalties and temperature, and after each filter.
    The chosen one is marked; none is for the token that follows. These are the numbers of `launch.chat --explain`.
    """
    following = [] if len(prompt) + len(answer) == engine.shape.length else [-1]
    if following:
        following = [int(np.argmax(engine.forward([*prompt, *answer])[-1]))]
    steps = explain.explain(engine, prompt, [*answer, *following], params, count=count)
    named = [[c._asdict() | {"name": explain.name_of(engine.tokenizer, c.token)} for c in step] for step in steps]
    for candidate in named[-1] if following else ():
        candidate["chosen"] = False
    return named


@functools.partial(jax.jit, static_argnums=2)
def _weights(attended: Attended, head: int, window: int | None) -> jax.Array:
    """Weights of one head, (T, T). The head is not a static argument, so all heads of a layer share a program."""
    q_BTHD, k_BTKD, bias_BHTT, sinks_H = attended.q_BTHD, attended.k_BTKD, attended.bias_BHTT, attended.sinks_H
    group = head * k_BTKD.shape[2] // q_BTHD.shape[2]
    q_BT1D, k_BT1D = (jax.lax.dynamic_slice_in_dim(x, i, 1, 2) for x, i in ((q_BTHD, head), (k_BTKD, group)))
    if bias_BHTT is not None:
        bias_BHTT = jax.lax.dynamic_slice_in_dim(bias_BHTT, head, 1, 1)
    if sinks_H is not None:
        sinks_H = jax.lax.dynamic_slice_in_dim(sinks_H, head, 1)
    position_1T = jnp.arange(q_BTHD.shape[1])[None]
    seen_1TT = visible(position_1T, position_1T, window=window)
    return weights(q_BT1D, k_BT1D, seen_1TT, bias_BHTT, attended.softcap, sinks_H)[0, 0]


def attention(view: View, layer: int, head: int) -> list[list[float]]:
    """Weights of one head, a row per token: how much it takes from every token up to itself; a row's sum is 1, or less
    by what a sink takes.

    Raises:
        UserError: there is no such layer or head, or the layer's mixer has no attention.
    """
    mixers = view.engine.transformer.config.mixers
    if not 0 <= layer < len(mixers):
        raise UserError(f"there is no layer {layer}: the model has layers 0 to {len(mixers) - 1}")
    attended, kernel = view.trace.attended[layer], MIXERS[type(mixers[layer])].kernel(mixers[layer])
    if attended is None or kernel is None:
        raise UserError(f"layer {layer} has no attention: its mixer is {type(mixers[layer]).__name__}")
    if not 0 <= head < kernel.heads:
        raise UserError(f"there is no head {head}: layer {layer} has heads 0 to {kernel.heads - 1}")
    with view.engine.on_mesh():
        w_TT = np.asarray(_weights(attended, head, kernel.window))
    T = len(view.ids)
    return [[round(float(w), 6) for w in w_TT[t, : t + 1]] for t in range(T)]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _lens(transformer: Transformer, params: Params, traced: Trace, next_T: jax.Array, count: int) -> list[Any]:
    """By number of layers: probabilities and ids of the best tokens (T, count), entropy, probability of the next."""
    found = []
    for layers in range(len(traced.streams)):
        logp_TV = jax.nn.log_softmax(trace.lens(transformer, params, traced, layers)[0])
        best_TC, ids_TC = jax.lax.top_k(logp_TV, count)
        entropy_T = -jnp.sum(jnp.exp(logp_TV) * logp_TV, axis=-1)
        next_logp_T = jnp.take_along_axis(logp_TV, next_T[:, None], axis=-1)[:, 0]
        found.append((jnp.exp(best_TC), ids_TC, entropy_T, jnp.exp(next_logp_T)))
    return found


def lens(view: View, *, count: int = 5, places: range | None = None) -> list[list[dict[str, Any]]]:
    """The logit lens: what the model would say next if it ended after 0, 1, ... layers; the last row is the model.

    By number of layers and token (those of `places`; None: all): the `count` best candidates, the entropy in nats, and
    the probability of the token that follows in the text (None after the last).
    """
    places = range(len(view.ids)) if places is None else places
    next_T = np.zeros(view.trace.forward.hidden.shape[1], np.int32)
    next_T[: len(view.ids) - 1] = view.ids[1:]
    engine = view.engine
    with engine.on_mesh():
        rows = jax.device_get(_lens(engine.transformer, engine.params, view.trace, next_T, max(count, LENS)))
    return [[_said(engine, row, t, len(view.ids), count) for t in places] for row in rows]


def _said(engine: Engine, row: Any, t: int, length: int, count: int) -> dict[str, Any]:
    best_TC, ids_TC, entropy_T, next_T = row
    best = [
        {"token": int(i), "name": explain.name_of(engine.tokenizer, int(i)), "probability": float(p)}
        for p, i in zip(best_TC[t, :count], ids_TC[t])
    ]
    return {"candidates": best, "entropy": float(entropy_T[t]), "next": float(next_T[t]) if t + 1 < length else None}
