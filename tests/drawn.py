"""Random arrays that are determined by a seed and a name, for golden files without weights."""

import zlib
from collections.abc import Mapping

import numpy as np


def drawn(seed: int, name: str, shape: tuple[int, ...], scale: float = 0.5) -> np.ndarray:
    """Float32 numbers between -scale and scale, whole multiples of 2^-16 of it, equal for every version of NumPy."""
    key = zlib.crc32(name.encode())
    words = np.random.Generator(np.random.PCG64([seed, key])).bytes(4 * int(np.prod(shape)))
    steps = np.frombuffer(words, "<u4").astype(np.int64) % (1 << 17) - (1 << 16)
    return (steps * (scale / (1 << 16))).astype(np.float32).reshape(shape)


def checksum(arrays: Mapping[str, np.ndarray]) -> int:
    """A number that changes with any bit of the arrays."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), total))
    return total
