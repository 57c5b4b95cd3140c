"""Which attention computes a training step: chosen by the devices, tried on them first, and told aloud."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.config import UserError, first_line
from jaxchat.model.attention import GQA
from jaxchat.model.kernels import BACKENDS, Facts, unsupported
from jaxchat.model.transformer import Model

PREFERRED = {"tpu": "splash", "gpu": "cudnn"}
TRIED_LENGTH, TRIED_WINDOW = 384, 50
TOLERANCE = 0.03  # Of the largest value; one key more or fewer under the window that is tried changes over 0.1 of it.


def choose_attention(
    wanted: str, model: Model, *, length: int, dtype: Any, device: Any, say: Callable[[str], None]
) -> str:
    """The row of `kernels.BACKENDS` for a model in training; "auto" takes the devices' own where it works.

    Raises:
        UserError: what is asked for by name cannot be served; the message says why.
    """
    name = PREFERRED.get(device.platform, "xla") if wanted == "auto" else wanted
    if name == "xla":
        return name
    if name == "splash" and device.platform == "cpu":
        say("attention splash runs in Pallas' interpreter on a CPU: for tests, not for training")
        return "splash_interpreted"
    present = device in jax.devices()
    reason = next(filter(None, (unsupported(name, facts(m, model, dtype, device)) for m in set(model.pattern))), None)
    if reason is None and present:
        tried = {(m.heads, m.kv_heads, m.head_dim, m.window is not None) for m in model.pattern}
        found = (
            differs(name, *one, min(length, TRIED_LENGTH), jnp.dtype(dtype).name, model.isolate_documents)
            for one in sorted(tried)
        )
        reason = next(filter(None, found), None)
    if reason is None:
        return name
    if wanted != "auto":
        raise UserError(f"attention={wanted} cannot be used: {reason}; set --attention=xla")
    say(f"attention xla, not {name}: {reason}")
    return "xla" if present or name != "cudnn" else "xla_remat"


def facts(mixer: GQA, model: Model, dtype: Any, device: Any) -> Facts:
    capability = float(getattr(device, "compute_capability", 0) or 0)
    present = device in jax.devices()
    return Facts(
        device.platform, dtype, mixer.head_dim, model.isolate_documents, mixer.window, capability, present=present
    )


@functools.cache
def differs(
    name: str, heads: int, kv_heads: int, head_dim: int, windowed: bool, length: int, dtype: str, isolate: bool
) -> str | None:
    """What is wrong with a backend's attention and gradient of two short rows, beside xla in float32; or None.

    Documents begin in the middle of a block, one is a single token, and rows differ in how many they have.
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
    try:
        found = jax.block_until_ready(run(BACKENDS[name], *arrays))
    except (RuntimeError, ValueError, TypeError, UserError) as error:  # Whatever a library says of a device.
        return f"{name} fails on this device ({first_line(error)})"
    for part, ours, theirs in zip(("attention", "dq", "dk", "dv"), found, wanted, strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        gap = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
        if not gap <= TOLERANCE:
            return f"{name} gives another {part} than float32 on this device (off by {gap:.2g} of the largest value)"
    return None
