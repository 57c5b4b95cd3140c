"""Whether a conversion has the weights and the logits of its source, read again by the program that it is for."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.errors import UserError, first_line, missing
from jaxchat.launcher import log
from jaxchat.model import Model, MoE, Transformer
from jaxchat.model.trace import trace
from jaxchat.model.transformer import Params

GROUP = 16  # Tokens at each of the places of `positions`.
# Bounds of differences, as shares of the largest value: in the first group, and in others, whose angles are less exact.
NEAR, FAR = 2e-4, 1e-2
SEED = 0


class Run(NamedTuple):
    """A forward pass: the residual stream (T, M) as it enters each layer, and the logits (T, V), in float32."""

    streams: list[np.ndarray]
    logits: np.ndarray


def positions(length: int) -> np.ndarray:
    """Positions of the tokens that are compared: the first, some above 2,048, and some up to 4,096, as far as `length`
    reaches. Attention masks count tokens, and rotations positions, so a short row with gaps has large distances."""
    starts = (0, 2100, min(length, 4112) - GROUP)
    found = {start + i for start in starts for i in range(GROUP) if 0 <= start + i < length}
    return np.array(sorted(found), np.int32)


def tokens(model: Model, length: int) -> np.ndarray:
    """As many fixed token ids, (T,)."""
    return np.random.default_rng(SEED).integers(0, model.vocab, len(positions(length))).astype(np.int32)


def same_tensors(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], where: str) -> None:
    """Raises UserError naming the first tensor of a parameter tree that differs from the one that was written or read.

    Values are compared in the type of ours; a vector equals a matrix of one row.
    """
    for name in ours:
        mine, other = ours[name], theirs[name]
        other = other.reshape(-1) if mine.ndim == 1 else other
        if mine.shape != other.shape or not np.array_equal(mine, other.astype(mine.dtype, copy=False)):
            raise UserError(f"{name} differs from the one in {where}: nothing was written, so please report this fault")


def same_logits(ours: Run, theirs: Run, where: str) -> None:
    """Raises UserError naming the first layer after which two forward passes differ."""
    if not _differ(ours.logits, theirs.logits):
        return
    layer = next((i for i, pair in enumerate(zip(ours.streams, theirs.streams)) if _differ(*pair)), None)
    name = "the embedding" if layer == 0 else f"layer {(layer or len(ours.streams)) - 1}"
    more = ", the final norm or the head" if layer is None else ""
    raise UserError(
        f"{name}{more} computes something else than {where} (logits differ by "
        f"{np.abs(ours.logits - theirs.logits).max():.2g}): nothing was written, so please report this fault"
    )


def _differ(ours: np.ndarray, theirs: np.ndarray) -> bool:
    gap = np.abs(ours - theirs)
    largest = max(float(np.abs(theirs).max()), 1e-6)
    return not (gap[:GROUP].max() <= NEAR * largest and gap.max() <= FAR * largest)  # NaN differs.


def run_ours(model: Model, params: Params, length: int) -> Run:
    """A forward pass in float32, a layer at a time, from parameters of any type."""
    transformer = Transformer(model)
    layers: list[Any] = [None] * model.depth
    for stack, repeats in zip(model.stacks, params["layers"], strict=True):
        for index, layer in enumerate(stack):
            # Experts are indexed within a loop of JAX; what else is a view takes no memory.
            put: Any = jax.device_put if isinstance(model.layers[layer].mlp, MoE) else np.asarray
            layers[layer] = jax.tree.map(lambda leaf, index=index, put=put: put(np.asarray(leaf)[index]), repeats)
    by_layer = {"ends": params["ends"], "layer": tuple(layers)}
    ids, at = jnp.asarray(tokens(model, length)[None]), jnp.asarray(positions(length)[None])
    traced = trace(transformer, by_layer, ids, at)
    logits = transformer.logits(by_layer, traced.forward.hidden)[0]
    return Run([np.asarray(stream[0]) for stream in traced.streams[:-1]], np.asarray(logits))


def run_theirs(directory: Path, model: Model, length: int) -> Run | None:
    """The same in transformers, from the files of a directory; None if torch or transformers are not installed.

    Raises:
        UserError: transformers cannot read the directory.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        log(str(missing("logits were not compared with those of transformers, which is not installed", "interop")))
        return None
    import torch
    import transformers

    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    except Exception as error:  # It raises errors of many kinds, also of its own.
        raise UserError(f"transformers cannot read {directory}: {first_line(error)}") from None
    ids, at = (torch.from_numpy(x)[None].long() for x in (tokens(model, length), positions(length)))
    with torch.no_grad():
        # With a mask, gaps between positions do not count as borders of documents.
        call = {"attention_mask": torch.ones_like(ids), "use_cache": False, "output_hidden_states": True}
        found = theirs(ids, position_ids=at, **call)
    return Run([x[0].numpy() for x in found.hidden_states[:-1]], found.logits[0].numpy())
