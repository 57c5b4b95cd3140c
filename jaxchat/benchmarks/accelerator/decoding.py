"""Decoding at growing batches: tokens a second, and the share of the memory's bandwidth that the bytes read make."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jaxchat import devices
from jaxchat.benchmarks import decode as engine_bench
from jaxchat.benchmarks.accelerator.options import Bench, Make
from jaxchat.benchmarks.accelerator.report import Rows
from jaxchat.compilation import compute_dtype
from jaxchat.launcher import log
from jaxchat.model.decoding_kernels import KERNELS
from jaxchat.model.transformer import Transformer

CHUNK = 16  # Steps a dispatch.


def decode(bench: Bench, make: Make, rows: Rows) -> None:
    """Greedy answers of the engine to prompts of equal lengths, at every batch size, by every kernel of the device."""
    device = jax.devices()[0]
    e = make(bench.depth, "july2026", bench.batch_tokens)
    transformer = Transformer(e.model, compute_dtype(e, device, log))
    weights, copied = device_weights(transformer), engine_bench.copy_bandwidth()
    asked = engine_bench.Bench(
        prompt_tokens=bench.prompt_tokens,
        decode_tokens=bench.decode_tokens,
        chunk=CHUNK,
        repeats=3,
        token_dispatch=False,
    )
    kernels = ["xla", *(name for name, platform in KERNELS.items() if platform == device.platform)]
    for size, kernel in itertools.product(bench.batch_sizes, kernels):
        each = dataclasses.replace(asked, decoding=kernel)
        measured = functools.partial(_one_size, transformer, weights, each, size, copied, device)
        rows.attempt({"depth": bench.depth, "rows": size, "decoding": kernel}, measured)


def _one_size(
    transformer: Transformer, weights: Any, asked: engine_bench.Bench, rows: int, copied: float, device: Any
) -> dict[str, Any]:
    found = engine_bench.one_size(transformer, weights, asked, rows, copied, None)
    read, length = found["step_bytes"], asked.prompt_tokens + asked.decode_tokens // 2
    matrices = engine_bench.step_bytes(transformer, 0, length)
    peak, rate = devices.peak_bandwidth(device), read / found["token_seconds"]
    return {
        "tokens_per_second": found["decode_tokens_per_second"],
        "tokens_per_second_with_prompts": found["tokens_per_second"],
        "token_seconds": found["token_seconds"],
        "first_token_seconds": found["first_token_seconds"],
        "weight_bytes": matrices,
        "cache_bytes": read - matrices,
        "bytes_per_second": round(rate),
        "copy_bytes_per_second": round(copied),
        "share_of_copy": round(rate / copied, 4),
        "share_of_peak_bandwidth": None if peak is None else round(rate / peak, 4),
        "length": length,
        "compile_seconds": found["compile_seconds"],
        "dtype": str(jnp.dtype(transformer.dtype)),
    }


def device_weights(transformer: Transformer) -> Any:
    """Random weights of ordinary size everywhere, made where they are needed: fresh ones have zeros in them."""
    leaves, tree = jax.tree.flatten(transformer.shapes())

    def draw() -> Any:
        keys = jax.random.split(jax.random.key(0), len(leaves))
        scales = [1.0 if leaf.ndim < 2 else max(leaf.shape[-2:]) ** -0.5 for leaf in leaves]
        drawn = [scale * jax.random.normal(key, leaf.shape) for key, leaf, scale in zip(keys, leaves, scales)]
        return jax.tree.unflatten(tree, drawn)

    return jax.jit(draw)()
