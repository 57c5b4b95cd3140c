"""The cost of a model: parameters by part, and training FLOPs per token."""

import functools
import math

import jax

from jaxchat.model.architecture import Model
from jaxchat.model.attention import MIXERS
from jaxchat.model.mlp import MLPS
from jaxchat.model.transformer import Transformer


@functools.cache
def parameter_counts(config: Model) -> dict[str, int]:
    """Parameters by part: embed, value_embeddings, head, matrices (those of the layers), scalars; their total, and how
    many of them are active for one token (all but those of the experts that it does not use)."""
    transformer = Transformer(config)
    counts = dict.fromkeys(("embed", "value_embeddings", "head", "matrices", "scalars"), 0)
    for spec, leaf in zip(*map(jax.tree.leaves, (transformer.specs(), transformer.shapes())), strict=True):
        counts[spec.group if spec.group in counts else "scalars"] += math.prod(leaf.shape)
    total = sum(counts.values())
    unused = [getattr(MLPS[type(layer.mlp)], "unused_parameters", None) for layer in config.layers]
    idle = sum(f(layer.mlp, config.width) for f, layer in zip(unused, config.layers) if f is not None)
    return counts | {"total": total, "active": total - idle}


def flops_per_token(config: Model, length: int) -> dict[str, int]:
    """Training FLOPs per token by part, forward and backward, for rows of `length` tokens.

    nanochat's convention (after PaLM, arXiv:2204.02311): 6 per active matrix parameter, and 12 H D min(window, T) per
    layer for attention, not halved for causality. Look-ups, norms and softmax are not counted.
    """
    mixers, mlps = ([getattr(layer, part) for layer in config.layers] for part in ("mixer", "mlp"))
    parts = {
        "mixers": 6 * sum(MIXERS[type(m)].matmul_parameters(m, config.width) for m in mixers),
        "attention": sum(MIXERS[type(m)].attention_flops(m, length) for m in mixers),
        "mlp": 6 * sum(MLPS[type(m)].matmul_parameters(m, config.width) for m in mlps),
        "head": 6 * config.padded_vocab * config.width,
        "smear": 0 if config.smear is None else 6 * config.smear.channels,
    }
    return parts | {"total": sum(parts.values())}
