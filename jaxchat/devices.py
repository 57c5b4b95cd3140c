"""Facts about devices: peak FLOPs and bandwidth, memory, compute capability."""

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxchat.machine import memory

# Dense bfloat16 FLOPs per second and memory bytes per second of one device (None: not known), from Google Cloud's TPU
# pages and NVIDIA's data sheets, by prefix of JAX's device_kind.
PEAKS: Mapping[str, tuple[float, float | None]] = {
    "TPU v4": (275e12, 1.2e12),
    "TPU v5 lite": (197e12, 0.819e12),
    "TPU v5e": (197e12, 0.819e12),
    "TPU v5p": (459e12, 2.765e12),
    "TPU v5": (459e12, 2.765e12),
    "TPU v6 lite": (918e12, 1.64e12),
    "TPU v6e": (918e12, 1.64e12),
    "NVIDIA A100": (312e12, None),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA H100": (989e12, None),
    "NVIDIA H100 PCIe": (756e12, None),
    "NVIDIA H100 80GB HBM3": (989e12, 3.352e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA B200": (2250e12, 7.672e12),
    "NVIDIA L4": (121e12, 0.3e12),
    "NVIDIA GeForce RTX 4090": (165e12, 1.008e12),
}


def peak_flops(device: Any) -> float | None:
    """Peak FLOPs per second of one device: from the table (None for an unknown kind), or measured on a CPU."""
    if device.platform == "cpu":
        return _measured_peak() / jax.local_device_count()
    return _peaks(device)[0]


def peak_bandwidth(device: Any) -> float | None:
    """Peak memory bandwidth of one device in bytes per second; None for an unknown kind or a CPU."""
    return _peaks(device)[1]


def capability(device: Any) -> float | None:
    """An NVIDIA GPU's compute capability, such as 9.0; None for other devices, where it is missing or not a number."""
    try:
        return float(device.compute_capability)
    except (AttributeError, TypeError, ValueError):
        return None


def compute_dtype(dtype: str, device: Any, log: Callable[[str], None] = lambda text: None) -> Any:
    """The type of activations and products on a device, in training and afterwards: `dtype` of an experiment, or for
    "auto" bfloat16 on accelerators that compute fast in it, float32 elsewhere."""
    if dtype != "auto":
        return jnp.dtype(dtype)
    if device.platform == "gpu" and (capability(device) or 8.0) < 8.0:
        log(f"{device.device_kind} has no fast bfloat16: computing in float32")
        return jnp.dtype("float32")
    return jnp.dtype("float32" if device.platform == "cpu" else "bfloat16")


def _peaks(device: Any) -> tuple[float | None, float | None]:
    """The entry whose key is the longest prefix of the device's kind."""
    known = [kind for kind in PEAKS if device.device_kind.startswith(kind)]
    return PEAKS[max(known, key=len)] if known else (None, None)


def _measured_peak(size: int = 1024, repeats: int = 4) -> float:
    """Float32 FLOPs per second of the whole CPU: the best of a few rounds of one square product per device."""
    devices = jax.local_devices()
    xs = [jax.device_put(jnp.ones((size, size), jnp.float32), d) for d in devices]
    product = jax.jit(jnp.matmul)
    best = math.inf
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready([product(x, x) for x in xs])
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 * len(devices) / best


def memory_bytes() -> int:
    """Peak memory in bytes so far: of the first local device if it has statistics, otherwise of this process."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats:
        return int(stats.get("peak_bytes_in_use", 0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_limit(device: Any) -> int:
    """Bytes of memory available to one device."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return memory() // jax.local_device_count()
