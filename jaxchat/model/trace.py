"""A forward pass with what it computed on the way, for inspection, and the logit lens on it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from jaxchat.model.dense import Scores
from jaxchat.model.layer import Block
from jaxchat.model.transformer import Forward, Params, Transformer


class Attended(NamedTuple):
    """Arguments and output of one layer's attention: q and o (B, T, H, D), k and v (B, T, K, D), and of its `Scores`
    the bias (B or 1, H, T, T), the softcap and the sinks (H,), each of which may be None."""

    q_BTHD: jax.Array
    k_BTKD: jax.Array
    v_BTKD: jax.Array
    o_BTHD: jax.Array
    bias_BHTT: jax.Array | None
    softcap: float | None
    sinks_H: jax.Array | None


class Trace(NamedTuple):
    """A forward pass and what it computed on the way.

    `streams` is the residual stream (B, T, M) as it enters the first layer and after each layer. `attended` has an
    entry per layer, None for a mixer without attention.
    """

    forward: Forward
    streams: tuple[jax.Array, ...]
    attended: tuple[Attended | None, ...]


def trace(transformer: Transformer, params: Params, tokens_BT: jax.Array, positions_BT: Any = None) -> Trace:
    """`Transformer.apply` without a cache; notes the calls of the layers and of their attention."""
    plain = dataclasses.replace(transformer.config, layer_loop="unroll", remat="none")
    streams, attended, found = list[jax.Array](), list[Attended | None](), list[Attended]()

    def note(call: Callable[..., Any], args: Any, kwargs: Any, at: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        if at.method_name == "attend":
            q_BTHD, k_BTKD, v_BTKD, scores, context, _ = args
            scores, at_BT = scores or Scores(), context.positions_BT
            bias_BHTT = None if scores.bias is None else scores.bias(at_BT, at_BT)
            found.append(Attended(q_BTHD, k_BTKD, v_BTKD, result[0], bias_BHTT, scores.softcap, scores.sinks_H))
        elif isinstance(at.module, Block) and at.method_name == "__call__":
            streams.extend([result[0]] if streams else [args[0], result[0]])
            attended.append(found.pop() if found else None)
        return result

    with nn.intercept_methods(note):
        forward = dataclasses.replace(transformer, config=plain).apply(params, tokens_BT, positions_BT=positions_BT)
    return Trace(forward, tuple(streams), tuple(attended))


def lens(transformer: Transformer, params: Params, traced: Trace, layers: int) -> jax.Array:
    """The logit lens (arXiv:2303.08112): logits (B, T, vocab) if the model ended after `layers` layers."""
    middle_BTM = traced.streams[min(layers, transformer.config.depth // 2 + 1)]
    return transformer.logits(params, transformer.finish(params["ends"], traced.streams[layers], middle_BTM))
