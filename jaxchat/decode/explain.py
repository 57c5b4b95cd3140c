"""Explains sampling (a token's probability after each step) and scores texts; both as tables for the terminal."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jaxchat.decode.engine import Engine
from jaxchat.decode.sampling import FILTERS, History, SamplingParams, SamplingRows, beginning, pack, penalise, warm
from jaxchat.tokenizer import Tokenizer


class Candidate(NamedTuple):
    """A candidate for one token: its logit, and its probability under the "model", after penalties and "temperature",
    and after each filter of `FILTERS` in turn.
    """

    token: int
    chosen: bool
    logit: float
    probabilities: dict[str, float]


class Scored(NamedTuple):
    """A token of a text: its logit and log-probability given the tokens before it."""

    token: int
    logit: float
    logprob: float


def explain(
    engine: Engine, prompt: Sequence[int], answer: Sequence[int], params: SamplingParams, *, count: int = 8
) -> list[list[Candidate]]:
    """Returns for each token of an answer the `count` most likely candidates, and the chosen one if not among them."""
    logits_TV = engine.forward([*prompt, *answer])[len(prompt) - 1 : -1]
    T, V = logits_TV.shape
    previous_TV = np.zeros((T, V), np.int32)  # One-hot, the token before.
    previous_TV[np.arange(1, T), list(answer[:-1])] = 1
    history = beginning([(prompt, params)] * T, rows=T, vocab=V)._replace(counts_BV=previous_TV.cumsum(axis=0))
    probabilities = jax.device_get(_probabilities(logits_TV, pack([(params, 0)] * T), history))
    steps = []
    for t, chosen in enumerate(answer):
        ids = np.argsort(-logits_TV[t], kind="stable")[:count].tolist()
        ids += [] if chosen in ids else [chosen]
        found = [{name: float(p_TV[t, i]) for name, p_TV in probabilities.items()} for i in ids]
        steps.append([Candidate(i, i == chosen, float(logits_TV[t, i]), of_i) for i, of_i in zip(ids, found)])
    return steps


@jax.jit
def _probabilities(logits_TV: jax.Array, rows: SamplingRows, history: History) -> dict[str, jax.Array]:
    """Probabilities after each step of sampling (for greedy decoding, one-hot after the penalties)."""
    z_TV = penalise(logits_TV, rows, history)
    greedy_T1 = (rows.temperature == 0)[:, None]
    best_TV = jax.nn.one_hot(jnp.argmax(z_TV, axis=1), z_TV.shape[1])
    z_TV = warm(z_TV, rows)
    steps = {"temperature": z_TV}
    for name, row in FILTERS.items():
        steps[name] = z_TV = row.apply(z_TV, rows.filters[name])
    after = {name: jnp.where(greedy_T1, best_TV, jax.nn.softmax(z_TV)) for name, z_TV in steps.items()}
    return {"model": jax.nn.softmax(logits_TV), **after}


def score(engine: Engine, ids: Sequence[int]) -> list[Scored]:
    """Scores every token of a text but the first, given the tokens before it."""
    logits_TV = engine.forward(ids)[:-1].astype(np.float64)
    logprobs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
    return [Scored(i, float(logits_TV[t, i]), float(logprobs_TV[t, i])) for t, i in enumerate(ids[1:])]


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """Printable form of a token: its text in quotes, the name of a special token, or its bytes if not valid UTF-8."""
    data = tokenizer.decode_bytes([token], keep_specials=True)
    if token in tokenizer.specials.values():
        return data.decode()
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return " ".join(f"<{byte:02x}>" for byte in data)


def step_table(
    tokenizer: Tokenizer, number: int, candidates: Sequence[Candidate], params: SamplingParams, *, sampled: bool = True
) -> Table:
    """Table of one token's candidates; a token that was not `sampled` is part of a tool's output."""
    table = Table(title=f"token {number}", title_justify="left")
    table.add_column("candidate")
    warm = f"{'penalties, ' if params.penalised else ''}T={params.temperature:g}"
    used = [name for name, row in FILTERS.items() if getattr(params, name) != row.off]
    for header in ("logit", "p", warm, *(f"{name.replace('_', '-')}={getattr(params, name):g}" for name in used)):
        table.add_column(header, justify="right")
    table.add_column("")
    mark = "chosen" if sampled else "tool output"
    for c in candidates:
        shares = (f"{p:.4f}" if p else "-" for p in (c.probabilities[name] for name in ("model", "temperature", *used)))
        table.add_row(name_of(tokenizer, c.token), f"{c.logit:.3f}", *shares, mark if c.chosen else "")
    return table


def score_table(tokenizer: Tokenizer, scored: Sequence[Scored]) -> Table:
    """Table of a text's tokens; the footer is the mean log-probability, and the loss."""
    table = Table(show_footer=True)
    table.add_column("token", footer="mean")
    table.add_column("logit", justify="right")
    table.add_column("probability", justify="right")
    loss = -sum(s.logprob for s in scored) / len(scored)
    table.add_column("log-probability", justify="right", footer=f"{-loss:.4f} (loss {loss:.4f})")
    for s in scored:
        table.add_row(name_of(tokenizer, s.token), f"{s.logit:.3f}", f"{math.exp(s.logprob):.4f}", f"{s.logprob:.4f}")
    return table
