"""The engine's compiled programs: prefill, admission into slots, decoding steps. Pure functions of their arguments.

They are compiled once per model and shape: the transformer is a static argument, so a second engine of the same model
compiles nothing. Updated caches are donated.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxchat import sharding
from jaxchat.decode.sampling import Choice, History, Level, SamplingRows, choose, logprob, most_likely
from jaxchat.model.transformer import Cache, Params, Transformer


class DecodeState(NamedTuple):
    """Decoding state per slot, arrays of shape (B,).

    `token_B`: last sampled token, not yet in the cache. `position_B`: its position, -1 if the slot is idle. `limit_B`:
    last position that the slot may fill. `stops_BN` (B, STOPS): tokens after which the device stops decoding the slot,
    padded with -1.
    """

    token_B: Any
    position_B: Any
    limit_B: Any
    stops_BN: Any


STOPS = 8  # Stop tokens per slot that the device knows. The host drops what is decoded after any other.
_SAMPLING = ("level", "return_support", "return_top")


def by_layer(transformer: Transformer, params: Params) -> Params:
    """`unstack`; parameters that are by layer already, of another engine of the model, are shared and not copied."""
    return params if "layer" in params else unstack(transformer, params)


@partial(jax.jit, static_argnums=0)
def unstack(transformer: Transformer, params: Params) -> Params:
    """Parameters per layer in the compute dtype, with the shardings for decoding."""
    axes, stacks = transformer.axes(), transformer.config.stacks
    cut = [jax.tree.map(lambda names: names[1:], own, is_leaf=lambda x: isinstance(x, tuple)) for own in axes["layers"]]
    own = {i: one for stack, one in zip(stacks, cut, strict=True) for i in stack}
    by_layer = {"ends": axes["ends"], "layer": tuple(own[i] for i in sorted(own))}
    put = lambda x, names: sharding.constrain(x, names, sharding.DECODE_RULES)  # noqa: E731
    return jax.tree.map(put, transformer.unstack(params), by_layer)


@partial(jax.jit, static_argnums=0)
def forward(transformer: Transformer, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """The logits after every token of the first row, (T, V), without a cache."""
    return transformer.logits(params, transformer.apply(params, tokens_BT).hidden)[0]


@partial(jax.jit, static_argnums=0)
def score(transformer: Transformer, params: Params, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of the first row's tokens given those before, (T-1,), and the most likely tokens at their
    places with theirs, (T-1, K), as `sampling.most_likely`."""
    logits_TV = forward(transformer, params, tokens_BT)[:-1].astype(jnp.float32)
    return logprob(logits_TV, tokens_BT[0, 1:]), *most_likely(logits_TV)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(transformer: Transformer, batch: int, length: int, write: int) -> Cache:
    """An empty cache, sharded over the mesh."""
    return shard_cache(transformer.empty_cache(batch, length, write=write))


@partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def prefill(
    transformer: Transformer,
    params: Params,
    tokens_RT: jax.Array,
    positions_RT: jax.Array,
    cache: Cache,
    logits_RV: jax.Array,
) -> tuple[Cache, jax.Array]:
    """Processes one chunk of each prompt; returns the cache and the logits after the chunk, (R, V).

    Positions are -1 for padding. A row that is all padding keeps its cache and its `logits_RV`.
    """
    hidden_RTM, cache_after, _, _ = transformer.apply(params, tokens_RT, positions_BT=positions_RT, cache=cache)
    assert cache_after is not None
    last_R11 = jnp.argmax(positions_RT, axis=1)[:, None, None]
    new_RV = transformer.logits(params, jnp.take_along_axis(hidden_RTM, last_R11, axis=1))[:, 0]
    read_R1 = (positions_RT.max(axis=1) >= 0)[:, None]
    return shard_cache(cache_after), jnp.where(read_R1, new_RV, logits_RV)


@partial(jax.jit, donate_argnums=0, static_argnames=_SAMPLING)
def first(
    history: History | None,
    logits_RV: jax.Array,
    length_R: jax.Array,
    take_N: jax.Array,
    slot_N: jax.Array,
    rows: SamplingRows,
    prompts: History | None,
    *,
    level: Level,
    return_support: bool = False,
    return_top: bool = False,
) -> tuple[History | None, Choice]:
    """Samples the first token after prefilled rows `take_N`, for slots `slot_N`. A slot out of range marks padding.

    `length_R` counts the tokens of the prefilled rows. `history` (of the slots) and `prompts` are for penalties only.
    The cache is left to `seat`, so that this program, slow to compile, does not depend on the shapes of caches.
    """
    returned = {"return_support": return_support, "return_top": return_top}
    choice = choose(logits_RV[take_N], rows, length_R[take_N] - 1, level=level, history=prompts, **returned)
    if history is not None and prompts is not None:
        put = lambda old, new: old.at[slot_N].set(new, mode="drop")  # noqa: E731
        rows_N = jnp.arange(slot_N.shape[0])
        counts_NV = prompts.counts_BV.at[rows_N, choice.token_B].add(1)
        history = History(*map(put, history, prompts._replace(counts_BV=counts_NV)))
    return history, choice


@partial(jax.jit, donate_argnums=0)
def seat(cache: Cache, source: Cache, take_N: jax.Array, slot_N: jax.Array) -> Cache:
    """Copies rows `take_N` of `source` into slots `slot_N` of a cache; indices out of range are ignored."""
    rows = jax.tree.map(lambda x: x[take_N], source)
    put = lambda old, new: old.at[slot_N].set(new, mode="drop")  # noqa: E731
    layers = tuple(
        jax.tree.map(put, old, new.resize(rows.length_B, old))
        for old, new in zip(cache.layers, rows.layers, strict=True)
    )
    return shard_cache(Cache(layers, put(cache.length_B, rows.length_B), put(cache.last_B, rows.last_B)))


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3), static_argnames=_SAMPLING)
def decode(
    transformer: Transformer,
    params: Params,
    cache: Cache,
    history: History | None,
    running: DecodeState,
    rows: SamplingRows,
    forced_KB: jax.Array,
    *,
    level: Level,
    return_support: bool = False,
    return_top: bool = False,
) -> tuple[Cache, History | None, Choice]:
    """Decodes K steps; returns the choices with leading axes (K, B), token -1 for none. Each step processes every
    slot's last token and samples the next one, unless `forced_KB` gives it (-1: not forced).

    A slot that reaches a stop token or its limit pauses: its cache and token stay as they are until the next dispatch.
    """
    slots_B = jnp.arange(running.token_B.shape[0])
    returned = {"return_support": return_support, "return_top": return_top}

    def step(carry: Any, forced_B: jax.Array) -> Any:
        token_B, position_B, paused_B, cache, history = carry
        at_B = jnp.where(paused_B, -1, position_B)
        hidden_B1M, cache, _, _ = transformer.apply(params, token_B[:, None], positions_BT=at_B[:, None], cache=cache)
        logits_BV = transformer.logits(params, hidden_B1M)[:, 0]
        choice = choose(logits_BV, rows, position_B, level=level, history=history, **returned)
        next_B = jnp.where(forced_B >= 0, forced_B, choice.token_B)
        if history is not None:
            history = history._replace(counts_BV=history.counts_BV.at[slots_B, next_B].add(~paused_B))
        outputs = choice._replace(token_B=jnp.where(paused_B, -1, next_B))
        token_B = jnp.where(paused_B, token_B, next_B)
        position_B = jnp.where(paused_B, position_B, position_B + 1)
        stopped_B = jnp.any(token_B[:, None] == running.stops_BN, axis=1) & (forced_B < 0)
        return (token_B, position_B, paused_B | stopped_B | (position_B >= running.limit_B), cache, history), outputs

    start = (running.token_B, running.position_B, running.position_B < 0, cache, history)
    (_, _, _, cache, history), steps = jax.lax.scan(step, start, forced_KB)
    return shard_cache(cache), history, steps


@partial(jax.jit, static_argnums=0, static_argnames=("length", "write"))
def move(transformer: Transformer, cache: Cache, take_B: jax.Array, *, length: int, write: int) -> Cache:
    """Copies rows `take_B` into a new cache of `length` positions that takes up to `write` tokens per call."""
    shapes = jax.eval_shape(lambda: transformer.empty_cache(1, length, write=write))
    rows = jax.tree.map(lambda x: x[take_B], cache)
    layers = tuple(row.resize(rows.length_B, shape) for row, shape in zip(rows.layers, shapes.layers, strict=True))
    return shard_cache(rows._replace(layers=layers))


def shard_cache(cache: Cache) -> Cache:
    """Applies the cache's sharding: rows over `data`, heads over `tensor`. Does nothing without a mesh."""
    layers = tuple(type(layer)(*map(sharding.constrain, layer, layer.axes)) for layer in cache.layers)
    return cache._replace(layers=layers)
