"""The cost of a model: parameters by part, and training FLOPs per token."""

import functools
import math

import jax

from jaxchat.model.attention import MIXERS
from jaxchat.model.mlp import MLPS
from jaxchat.model.transformer import Model, Transformer


@functools.cache
def parameter_counts(config: Model) -> dict[str, int]:
    """Parameters by part: embed, value_embeddings, head, matrices (those of the layers), scalars, total."""
    params = Transformer(config).shapes()
    counts = dict.fromkeys(("embed", "value_embeddings", "head", "matrices", "scalars"), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        part = {"value_embedding": "value_embeddings", "embed": "embed", "head": "head"}.get(name)
        part = part or ("matrices" if path[0].key == "layers" else "scalars")
        counts[part] += math.prod(leaf.shape)
    return counts | {"total": sum(counts.values())}


def flops_per_token(config: Model, length: int) -> dict[str, int]:
    """Training FLOPs per token by part, forward and backward, for rows of `length` tokens.

    nanochat's convention (after PaLM, arXiv:2204.02311): 6 per matrix parameter, and 12 H D min(window, T) per layer
    for attention, not halved for causality. Look-ups, norms and softmax are not counted.
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
