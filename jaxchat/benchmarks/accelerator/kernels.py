"""Attention and loss alone, forward and backward, at the shapes of a model."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxchat.benchmarks.accelerator.options import Bench, Make
from jaxchat.benchmarks.accelerator.report import Rows
from jaxchat.benchmarks.accelerator.timing import quantiles, time_call
from jaxchat.compilation import compute_dtype
from jaxchat.launcher import log
from jaxchat.model.choice import PREFERRED
from jaxchat.model.kernels import BACKENDS, Backend
from jaxchat.model.transformer import Model
from jaxchat.objectives.logprobs import weighted_nll

DOCUMENT = 512  # Tokens of a document where a row is cut into some.


def backends() -> Mapping[str, Backend]:
    """The rows of attention's table that are for these devices."""
    own = PREFERRED.get(jax.default_backend())
    return {name: backend for name, backend in BACKENDS.items() if name in ("xla", "xla_remat", own)}


def attention(bench: Bench, make: Make, rows: Rows) -> None:
    """Milliseconds and TFLOP/s of every backend, with and without documents and a window."""
    model = make(bench.depth, "july2026", bench.batch_tokens).model
    mixer = next((mixer for mixer in model.pattern if mixer.window), model.pattern[0])
    B, T, H, D = bench.kernel_rows, bench.row_length, mixer.heads, mixer.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    dtype = compute_dtype(make(bench.depth, "july2026", bench.batch_tokens), jax.devices()[0], log)
    q_BTHD, k_BTHD, v_BTHD, do_BTHD = (jax.random.normal(key, (B, T, H, D), dtype) for key in keys)
    segments_BT = jnp.broadcast_to(jnp.arange(T) // min(DOCUMENT, T // 2), (B, T)).astype(jnp.int32)
    masks = [(window, documents) for window in dict.fromkeys((None, mixer.window)) for documents in (True, False)]
    for window, documents in masks:
        for name, backend in backends().items():
            segments = segments_BT if documents else None
            flops = attention_flops(B, T, H, D, window=window)
            forward = _bound(backend, segments, window)
            label = {"backend": name, "window": window, "documents": documents}
            qkv = (q_BTHD, k_BTHD, v_BTHD)
            rows.attempt(label, functools.partial(_attention, forward, qkv, do_BTHD, flops, bench.repeats))


def _bound(backend: Backend, segments_BT: jax.Array | None, window: int | None) -> Callable[..., jax.Array]:
    return lambda q, k, v: backend(q, k, v, segments_BT, window)


def _attention(
    forward: Callable[..., jax.Array], qkv: tuple[jax.Array, ...], do_BTHD: jax.Array, flops: float, repeats: int
) -> dict[str, Any]:
    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        out, back = jax.vjp(forward, q, k, v)
        return out, back(do)

    told: dict[str, Any] = {"flops_forward": flops, "shape_BTHD": list(do_BTHD.shape), "dtype": str(do_BTHD.dtype)}
    for name, function, arguments, work in (
        ("forward", forward, qkv, flops),
        ("both", both, (*qkv, do_BTHD), 3.5 * flops),
    ):
        compiled = jax.jit(function).lower(*arguments).compile()
        seconds = time_call(functools.partial(compiled, *arguments), repeats=repeats)
        told |= _speed(name, seconds, work) | {f"{name}_temporary_bytes": temporary_bytes(compiled)}
    return told


def _speed(name: str, seconds: list[float], flops: float) -> dict[str, Any]:
    spread = quantiles(seconds)
    tflops = round(flops / spread["median"] / 1e9, 3)
    return {f"{name}_ms": spread["median"], f"{name}_tflops_per_second": tflops, f"{name}_spread_ms": spread}


def attention_flops(B: int, T: int, H: int, D: int, *, window: int | None) -> float:
    """FLOPs of q k^T and p v over the pairs that the mask lets see each other, documents not counted.

    The backward pass has five such products where the forward has two, so both together have 3.5 times as many.
    """
    return 4.0 * B * H * D * visible_pairs(T, window)


def visible_pairs(T: int, window: int | None) -> int:
    """Pairs of query and key in a row: a query at t sees min(t, window) keys before it, and itself."""
    W = T if window is None else min(window, T)
    return T * (W + 1) - W * (W + 1) // 2


def temporary_bytes(compiled: Any) -> int | None:
    """Bytes that a program needs beside its arguments, by the compiler."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def loss(bench: Bench, make: Make, rows: Rows) -> None:
    """The chunked loss and the one that builds every logit at once: milliseconds and bytes, gradients included."""
    e = make(bench.depth, "july2026", bench.batch_tokens)
    B, T, c = bench.kernel_rows, bench.row_length, e.model
    dtype = compute_dtype(e, jax.devices()[0], log)
    keys = jax.random.split(jax.random.key(1), 3)
    hidden_BTM = jax.random.normal(keys[0], (B, T, c.width), dtype)
    head_MV = 0.02 * jax.random.normal(keys[1], (c.width, c.padded_vocab), jnp.float32)
    targets_BT = jax.random.randint(keys[2], (B, T), 0, c.vocab, jnp.int32)
    arguments = (hidden_BTM, head_MV, targets_BT)
    flops = 6.0 * B * T * c.width * c.padded_vocab
    for chunk in dict.fromkeys((*(size for size in bench.loss_chunks if size <= B * T), 0)):
        function = functools.partial(naive_nll, c) if chunk == 0 else functools.partial(chunked_nll, c, chunk)
        label = {"loss": "naive"} if chunk == 0 else {"loss": "chunked", "chunk_tokens": chunk}
        rows.attempt(label, functools.partial(_loss, function, arguments, flops, bench.repeats))


def _loss(function: Callable[..., jax.Array], arguments: Any, flops: float, repeats: int) -> dict[str, Any]:
    compiled = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*arguments).compile()
    value, _ = compiled(*arguments)
    seconds = time_call(functools.partial(compiled, *arguments), repeats=repeats)
    bytes_ = temporary_bytes(compiled)
    return {
        **_speed("both", seconds, flops),
        "temporary_bytes": bytes_,
        "flops": flops,
        "value": float(value),
        "shape_BTMV": [*arguments[0].shape, arguments[1].shape[1]],
        "dtype": str(arguments[0].dtype),
    }


def chunked_nll(c: Model, chunk: int, hidden_BTM: jax.Array, head_MV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    ones_BT = jnp.ones(targets_BT.shape, jnp.float32)
    return weighted_nll(hidden_BTM, head_MV, targets_BT, ones_BT, vocab=c.vocab, softcap=c.softcap, chunk_tokens=chunk)


def naive_nll(c: Model, hidden_BTM: jax.Array, head_MV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """The same sum through an array of (B, T, V), differentiated by JAX."""
    w_MV = head_MV[:, : c.vocab].astype(hidden_BTM.dtype)
    z_BTV = jnp.einsum("BTM,MV->BTV", hidden_BTM, w_MV, preferred_element_type=jnp.float32)
    if c.softcap is not None:
        z_BTV = c.softcap * jnp.tanh(z_BTV / c.softcap)
    target_BT = jnp.take_along_axis(z_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(z_BTV, axis=-1) - target_BT)
