"""What the cache saves, and what remembered prefixes cost."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxchat.benchmarks.engines import generate, make_engine, prompts
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams, choose, pack
from jaxchat.launcher import log
from jaxchat.model.transformer import Transformer


def cache_curve(
    transformer: Transformer,
    weights: Any,
    lengths: Sequence[int],
    params: SamplingParams,
    *,
    prompt_tokens: int,
    chunk: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Seconds for answers of several lengths, with the cache and with a forward pass over the whole text a token."""
    (prompt,) = prompts(transformer.config.vocab, 1, prompt_tokens)
    curve = []
    for count in lengths:
        asked = dataclasses.replace(params, max_tokens=count)
        engine = make_engine(transformer, weights, length=prompt_tokens + count, slots=1, steps=chunk)
        naive = Naive(transformer, engine.params, asked)
        equal = generate(engine, [prompt], asked)[0].tokens == tuple(naive(prompt))
        cached = functools.partial(generate, engine, [prompt], asked)
        seconds = alternate({"cached": cached, "naive": functools.partial(naive, prompt)}, repeats)
        log(f"{count} tokens: cached {seconds['cached']:.3f} s, naive {seconds['naive']:.3f} s")
        curve.append(
            {
                "tokens": count,
                "cached_seconds": round(seconds["cached"], 5),
                "naive_seconds": round(seconds["naive"], 5),
                "ratio": round(seconds["naive"] / seconds["cached"], 2),
                "equal": equal,
            }
        )
    return curve


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, each run `repeats` times in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Naive:
    """Decoding without a cache: each token costs a compiled forward pass over the text so far."""

    def __init__(self, transformer: Transformer, params: Any, asked: SamplingParams) -> None:
        rows = pack([(asked, 0)])

        def step(params: Any, ids_1T: jax.Array, size: jax.Array) -> jax.Array:
            hidden_1TM, _ = transformer.apply(params, ids_1T)
            last_11M = jax.lax.dynamic_slice_in_dim(hidden_1TM, size - 1, 1, axis=1)
            logits_1V = transformer.logits(params, last_11M)[:, 0]
            return choose(logits_1V, rows, (size - 1)[None], level=asked.level).token_B[0]

        self._params, self._step, self._count = params, jax.jit(step), asked.max_tokens

    def __call__(self, prompt: Sequence[int]) -> list[int]:
        ids = list(prompt)
        for _ in range(self._count):
            padded_1T = np.zeros((1, -(-len(ids) // 64) * 64), np.int32)
            padded_1T[0, : len(ids)] = ids
            ids.append(int(self._step(self._params, padded_1T, np.int32(len(ids)))))
        return ids[len(prompt) :]


FEW, MANY = 64, 256


def stored_prefixes(
    transformer: Transformer, weights: Any, *, prompt_tokens: int, decode_tokens: int, chunk: int, repeats: int
) -> dict[str, Any]:
    """How much longer answers take beside four times as many remembered prefixes that all begin alike.

    The prompts continue prefixes, so that finding them is in the time.
    """
    (shared,), tails = (prompts(transformer.config.vocab, rows, prompt_tokens) for rows in (1, 4))
    params = SamplingParams(0.0, max_tokens=decode_tokens, ignore_end=True)
    prefixes = [[*shared, 1 + i // 32, 1 + i % 32] for i in range(MANY)]
    asked, sides = [[*prefixes[i], *tail] for i, tail in enumerate(tails)], {}
    for count in (FEW, MANY):
        length = len(asked[0]) + decode_tokens
        engine = make_engine(transformer, weights, length=length, slots=4, steps=chunk, prefix_cache_bytes=1 << 34)
        one = dataclasses.replace(params, max_tokens=1)
        engine.generate([Request(prefix, one, keep=True) for prefix in prefixes[:count]])
        before = engine.prompt_stats.reused
        generate(engine, asked, params)
        assert engine.prompt_stats.reused - before == sum(map(len, prefixes[:4])), "what is stored is used"
        sides[str(len(engine.prefixes))] = functools.partial(generate, engine, asked, params)
    few, many = alternate(sides, repeats).values()
    log(f"{' and '.join(sides)} remembered prefixes: {few:.4f} and {many:.4f} s")
    return {
        "stored": [int(name) for name in sides],
        "seconds": [round(few, 5), round(many, 5)],
        "ratio": round(many / few, 4),
    }
