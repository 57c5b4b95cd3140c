"""Looks at what a model holds apart from any text: its embedding, its cache, and its checkpoints over a run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxchat import checkpoint
from jaxchat.decode.engine import Engine
from jaxchat.decode.explain import name_of
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.inspection.text import candidates, losses
from jaxchat.loading import load_checkpoint
from jaxchat.model.transformer import Transformer


def embedding(engine: Engine) -> np.ndarray:
    """The embedding of every id, float32 (vocab, M)."""
    return np.asarray(engine.params["ends"]["embed"], np.float32)[: engine.transformer.config.vocab]


def neighbours(engine: Engine, token: int, *, count: int = 12) -> list[dict[str, Any]]:
    """The ids whose embeddings point most nearly the same way as that of `token`, with the cosine of the angle."""
    table_VM = embedding(engine)
    if not 0 <= token < len(table_VM):
        raise UserError(f"there is no token {token}: the vocabulary has ids 0 to {len(table_VM) - 1}")
    norms_V = np.maximum(np.linalg.norm(table_VM, axis=1), 1e-12)
    cosine_V = table_VM @ table_VM[token] / (norms_V * norms_V[token])
    best = [int(i) for i in np.argsort(-cosine_V, kind="stable") if i != token][:count]
    return [{"token": i, "name": name_of(engine.tokenizer, i), "cosine": float(cosine_V[i])} for i in best]


def embedding_map(engine: Engine, tokens: Sequence[int] | None = None) -> dict[str, Any]:
    """Embeddings in two dimensions: the first two principal components of the whole table, for `tokens` (None: all).

    `variance` has the share of the table's variance that each axis shows; the sign of an axis makes its largest entry
    positive.
    """
    table_VM = embedding(engine).astype(np.float64)
    centred_VM = table_VM - table_VM.mean(axis=0)
    values_M, axes_MM = np.linalg.eigh(centred_VM.T @ centred_VM)
    axes_M2 = axes_MM[:, ::-1][:, :2]
    axes_M2 = axes_M2 * np.sign(np.take_along_axis(axes_M2, np.abs(axes_M2).argmax(axis=0)[None], axis=0))
    places_V2 = centred_VM @ axes_M2
    chosen = range(len(table_VM)) if tokens is None else [int(i) for i in tokens]
    points = [
        {"token": i, "name": name_of(engine.tokenizer, i), "x": float(x), "y": float(y)}
        for i, (x, y) in zip(chosen, places_V2[list(chosen)])
    ]
    shares = values_M[::-1][:2] / max(values_M.sum(), 1e-30)
    return {"points": points, "variance": [float(share) for share in shares]}


def cache_bytes(transformer: Transformer, length: int) -> dict[str, Any]:
    """Bytes of one row's cache after 1, 2, 4, ... up to `length` tokens: of every layer, and in total.

    A layer with a window stops growing once the window is full.
    """
    lengths = sorted({*(2**n for n in range(length.bit_length()) if 2**n < length), length})
    caches = [jax.eval_shape(lambda n=n: transformer.empty_cache(1, n, write=1)).layers for n in lengths]
    layers = [
        {
            "layer": i,
            "window": getattr(mixer, "window", None),
            "bytes": [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache[i])) for cache in caches],
        }
        for i, mixer in enumerate(transformer.config.mixers)
    ]
    total = [sum(sizes) for sizes in zip(*(layer["bytes"] for layer in layers))]
    return {"lengths": lengths, "layers": layers, "bytes": total}


def over_steps(
    engine: Engine, directory: Path, prompt: Sequence[int], ids: Sequence[int], sampling: SamplingParams
) -> list[dict[str, Any]]:
    """Answers a prompt and scores a text at every checkpoint and snapshot of a stage, oldest first; the engine keeps
    the last parameters.

    Each row has the greedy answer (`text`), the `candidates` for its first token, the `losses` of every token of `ids`
    but the first, and `error`, the reason why there is no answer.
    """
    found, greedy = [], dataclasses.replace(sampling, temperature=0.0)
    for step in checkpoint.readable_steps(directory):
        engine.load(load_checkpoint(f"{directory}@{step}").params())
        (answer,) = engine.generate([Request(prompt, greedy)])[0]
        by_token = losses(engine, ids) if len(ids) > 1 else []
        found.append(
            {
                "step": step,
                "text": answer.text,
                "error": answer.error,
                "losses": by_token,
                "loss": float(np.mean([token["loss"] for token in by_token])) if by_token else None,
                "candidates": candidates(engine, prompt, [], sampling)[0] if not answer.error else [],
            }
        )
    return found
