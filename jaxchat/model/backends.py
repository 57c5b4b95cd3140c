"""Selects attention backends for training and decoding; tests them on the device before use and logs fallbacks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import devices
from jaxchat.data.cache import Log
from jaxchat.errors import UserError, first_line
from jaxchat.model import cache as kv
from jaxchat.model.architecture import Model
from jaxchat.model.attention import MIXERS
from jaxchat.model.decoding_kernels import DECODING
from jaxchat.model.kernels import BACKENDS, AttentionCase, unsupported
from jaxchat.model.part import Attends
from jaxchat.sharding import apart

PREFERRED = {"tpu": "splash", "gpu": "cudnn"}
PREFERRED_DECODING = {"tpu": "filled"}
TRIED_LENGTH, TRIED_WINDOW = 384, 50
TRIED_SLOTS = {False: 1100, True: 602}  # Cache slots without and with a window; not multiples of the kernel's blocks.
TOLERANCE = 0.03  # Relative to the largest value; a window that is off by one changes more than 0.1.


def choose_attention(wanted: str, model: Model, *, length: int, dtype: Any, device: Any, log: Log) -> str:
    """The name in `kernels.BACKENDS` for training; "auto" prefers the platform's fused kernel and falls back to XLA.

    Raises:
        UserError: a backend that is requested by name cannot be used; the message gives the reason.
    """
    name = PREFERRED.get(device.platform, "xla") if wanted == "auto" else wanted
    test = functools.partial(
        apart, differs, name, min(length, TRIED_LENGTH), jnp.dtype(dtype).name, model.isolate_documents
    )
    chosen = _choose("attention", wanted, name, BACKENDS, model, dtype=dtype, device=device, test=test, log=log)
    absent = device not in jax.devices()
    return "xla_remat" if (name, chosen, absent) == ("cudnn", "xla", True) else chosen


def choose_decoding(wanted: str, model: Model, *, dtype: Any, device: Any, log: Log) -> str:
    """The name in `DECODING` for decoding a model; "auto" uses the kernel on TPUs where it works, XLA elsewhere.

    Raises:
        UserError: a backend that is requested by name cannot be used; the message gives the reason.
    """
    name = PREFERRED_DECODING.get(device.platform, "xla") if wanted == "auto" else wanted
    test = functools.partial(apart, decodes_otherwise, name, jnp.dtype(dtype).name)
    return _choose("decoding", wanted, name, DECODING, model, dtype=dtype, device=device, test=test, log=log)


def _choose(
    setting: str,
    wanted: str,
    name: str,
    backends: Mapping[str, Any],
    model: Model,
    *,
    dtype: Any,
    device: Any,
    test: Callable[..., str | None],
    log: Log,
) -> str:
    """`name` if it can be used and `test` of every kernel call finds no problem; otherwise "xla", or UserError."""
    if name == "xla":
        return name
    if name not in backends:
        raise UserError(f"unknown {setting} backend {name!r}; expected one of: auto, {', '.join(backends)}")
    if device.platform == "cpu" and f"{name}_interpreted" in backends:
        log(f"{setting} {name} runs in Pallas' interpreter on a CPU, which is slow and meant for tests only")
        return f"{name}_interpreted"
    calls = kernel_calls(model)
    reason = next(filter(None, (unsupported(name, attention_case(call, model, dtype, device)) for call in calls)), None)
    if reason is None and device in jax.devices():
        reason = next(filter(None, (test(*case) for case in tried(calls))), None)
    if reason is None:
        return name
    if wanted != "auto":
        raise UserError(f"{setting}={wanted} cannot be used: {reason}; set --{setting}=xla")
    log(f"{setting} xla, not {name}: {reason}")
    return "xla"


def kernel_calls(model: Model) -> set[Attends]:
    """The shapes with which the model's mixers call an attention kernel."""
    return {call for layer in model.layers if (call := MIXERS[type(layer.mixer)].kernel(layer.mixer)) is not None}


def tried(calls: set[Attends]) -> list[tuple[int, int, int, bool]]:
    """The distinct test cases of the kernel calls: heads, kv heads, head size, and whether there is a window."""
    return sorted({(call.heads, call.kv_heads, call.head_dim, call.window is not None) for call in calls})


def attention_case(mixer: Attends, model: Model, dtype: Any, device: Any) -> AttentionCase:
    """A mixer's attention call on a device, which may be absent, as `unsupported` judges it."""
    capability = devices.capability(device) or 0.0
    present = device in jax.devices()
    isolate = model.isolate_documents
    task = (device.platform, dtype, mixer.head_dim, isolate, mixer.window)
    return AttentionCase(*task, capability, present, mixer.dense, mixer.dropout)


@functools.cache
def differs(
    name: str, length: int, dtype: str, isolate: bool, heads: int, kv_heads: int, head_dim: int, windowed: bool
) -> str | None:
    """Compares a backend's attention and gradients with `xla` in float32; returns the problem as text, or None.

    The two short test rows differ in their number of documents. Documents begin inside a block; one is a single token.
    """
    generator, size = np.random.default_rng(0), (2, length)
    draw = lambda n: jnp.asarray(generator.standard_normal((*size, n, head_dim)), dtype)  # noqa: E731
    arrays, probe = (draw(heads), draw(kv_heads), draw(kv_heads)), draw(heads).astype(jnp.float32)
    starts = np.array([[5, 6, length // 2], [length // 3, length, length]])
    segments = jnp.asarray((np.arange(length)[None, :, None] >= starts[:, None]).sum(2), jnp.int32)
    window = TRIED_WINDOW if windowed else None

    def results(backend: Any, *arrays: jax.Array) -> Any:
        def total(*arrays: jax.Array) -> Any:
            o_BTHD = backend(*arrays, segments if isolate else None, window)
            return jnp.sum(o_BTHD.astype(jnp.float32) * probe), o_BTHD

        gradients, o_BTHD = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return (o_BTHD, *gradients)

    run = jax.jit(results, static_argnums=0)
    with jax.default_matmul_precision("highest"):
        wanted = run(BACKENDS["xla"], *(x.astype(jnp.float32) for x in arrays))
    return _problem(name, lambda: run(BACKENDS[name], *arrays), wanted, ("attention", "dq", "dk", "dv"))


@functools.cache
def decodes_otherwise(name: str, dtype: str, heads: int, kv_heads: int, head_dim: int, windowed: bool) -> str | None:
    """Compares a backend's decoding of one token per row with `xla` in float32; returns the problem as text, or None.

    The test rows are idle, have one or two tokens, end inside a block or at the end of the cache, or have wrapped
    around the ring.
    """
    generator, window, slots = np.random.default_rng(0), TRIED_WINDOW if windowed else None, TRIED_SLOTS[windowed]
    at_B1 = jnp.asarray([-1, 0, 1, 300, slots - 1, 2 * slots // 3, windowed * slots + 1], jnp.int32)[:, None]
    draw = lambda *shape: jnp.asarray(generator.standard_normal((at_B1.size, *shape, head_dim)), dtype)  # noqa: E731
    q_B1HD, cache = draw(1, heads), kv.KVCache(draw(kv_heads, slots), draw(kv_heads, slots))

    def run(name: str, dtype: Any) -> jax.Array:
        attend = jax.jit(DECODING[name], static_argnums=4)
        q, own = jax.tree.map(lambda x: x.astype(dtype), (q_B1HD, cache))
        return jnp.where((at_B1 >= 0)[..., None, None], attend(q, own, at_B1, at_B1[:, 0] + 1, window), 0)

    with jax.default_matmul_precision("highest"):
        wanted = run("xla", jnp.float32)
    return _problem(name, lambda: [run(name, dtype)], [wanted], ("attention to a cache",))


def _problem(name: str, run: Callable[[], Any], wanted: Any, parts: tuple[str, ...]) -> str | None:
    """Describes the first difference between `run()` and the `wanted` results, or the error of `run()`; or None."""
    try:
        results = jax.block_until_ready(run())
    except (RuntimeError, ValueError, TypeError, UserError) as error:  # Libraries raise any of these for a device.
        return f"{name} fails on this device ({first_line(error)})"
    for part, result, reference in zip(parts, results, wanted, strict=True):
        result, reference = (np.asarray(x, np.float32) for x in (result, reference))
        gap = float(np.max(np.abs(result - reference)) / np.max(np.abs(reference)))
        if not gap <= TOLERANCE:
            return f"{name} computes a wrong {part} on this device (off by {gap:.2g} of the largest value)"
    return None
