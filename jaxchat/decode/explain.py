"""Why a token was chosen, and how likely a text is: tables of what the model and each step of sampling say."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jaxchat.decode.engine import Engine
from jaxchat.decode.sampling import SamplingParams, keep
from jaxchat.tokenizer import Tokenizer


class Candidate(NamedTuple):
    """A token that could have come: its logit, and its probability by the model, after temperature, top-k and top-p."""

    token: int
    chosen: bool
    logit: float
    model: float
    temperature: float
    top_k: float
    top_p: float


class Scored(NamedTuple):
    """A token of a text: its logit, probability, and log-probability given all before it."""

    token: int
    logit: float
    probability: float
    logprob: float


def explain(
    engine: Engine, prompt: Sequence[int], answer: Sequence[int], params: SamplingParams, *, count: int = 8
) -> list[list[Candidate]]:
    """For each token of an answer, the `count` most likely candidates, and the chosen one if it is not among them.

    Penalties and biases are not shown.
    """
    logits_TV = engine.forward([*prompt, *answer])[len(prompt) - 1 : -1]
    columns = [np.asarray(column) for column in _stages(logits_TV, params)]
    steps = []
    for t, chosen in enumerate(answer):
        ids = np.argsort(-logits_TV[t], kind="stable")[:count].tolist()
        ids += [] if chosen in ids else [chosen]
        made = [Candidate(i, i == chosen, *(float(column[t, i]) for column in columns)) for i in ids]
        steps.append(made)
    return steps


def _stages(logits_TV: np.ndarray, params: SamplingParams) -> tuple[jax.Array, ...]:
    """Logits, and the probabilities after each step of sampling."""
    T = len(logits_TV)
    z_TV = jnp.asarray(logits_TV)
    if params.temperature == 0:  # greedy: all of the mass on the most likely
        one_TV = jax.nn.one_hot(jnp.argmax(z_TV, axis=1), z_TV.shape[1])
        return z_TV, jax.nn.softmax(z_TV), one_TV, one_TV, one_TV
    warm_TV = z_TV / max(params.temperature, 1e-6)
    all_T, k_T = jnp.ones((T,)), jnp.full((T,), params.top_k, jnp.int32)
    after_k_TV = keep(warm_TV, k_T, all_T)
    after_p_TV = keep(warm_TV, k_T, jnp.full((T,), params.top_p), jnp.full((T,), params.min_p))
    return z_TV, *(jax.nn.softmax(x) for x in (z_TV, warm_TV, after_k_TV, after_p_TV))


def score(engine: Engine, ids: Sequence[int]) -> list[Scored]:
    """Every token of a text after its first, given those before."""
    logits_TV = engine.forward(ids)[:-1].astype(np.float64)
    shifted = logits_TV - logits_TV.max(axis=1, keepdims=True)
    logprobs_TV = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return [
        Scored(token, float(logits_TV[t, token]), math.exp(logprobs_TV[t, token]), float(logprobs_TV[t, token]))
        for t, token in enumerate(ids[1:])
    ]


def name(tokenizer: Tokenizer, token: int) -> str:
    """A token as it can be read: its text quoted, or its special name, or its bytes where they are no character."""
    data = tokenizer.decode_bytes([token], keep_specials=True)
    if token in tokenizer.specials.values():
        return data.decode()
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return " ".join(f"<{byte:02x}>" for byte in data)


def step_table(tokenizer: Tokenizer, number: int, candidates: Sequence[Candidate], params: SamplingParams) -> Table:
    """One step of an explanation."""
    table = Table(title=f"token {number}", title_justify="left")
    table.add_column("candidate")
    for header in ("logit", "p", f"T={params.temperature:g}", f"top-k={params.top_k}", f"top-p={params.top_p:g}"):
        table.add_column(header, justify="right")
    table.add_column("")
    for c in candidates:
        shares = (f"{p:.4f}" if p else "-" for p in (c.model, c.temperature, c.top_k, c.top_p))
        table.add_row(name(tokenizer, c.token), f"{c.logit:.3f}", *shares, "chosen" if c.chosen else "")
    return table


def score_table(tokenizer: Tokenizer, scored: Sequence[Scored]) -> Table:
    """A text's tokens, and as the last row the mean that is the loss."""
    table = Table(show_footer=True)
    table.add_column("token", footer="mean")
    table.add_column("logit", justify="right")
    table.add_column("probability", justify="right")
    loss = -sum(s.logprob for s in scored) / len(scored)
    table.add_column("log-probability", justify="right", footer=f"{-loss:.4f} (loss {loss:.4f})")
    for s in scored:
        table.add_row(name(tokenizer, s.token), f"{s.logit:.3f}", f"{s.probability:.4f}", f"{s.logprob:.4f}")
    return table
