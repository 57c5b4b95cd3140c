"""Random weights that are made again from a seed and their name, so that no golden file has to hold them."""

import hashlib
import zlib
from collections.abc import Mapping

import numpy as np

SEED, GRID = 17, 1 / 64  # Weights are whole multiples of it: exact in float32 and bfloat16.


def random_weight(name: str, shape: tuple[int, ...], seed: int = SEED, scale: float = 0.4) -> np.ndarray:
    """A weight by its name in the state dict, in float32; that of a norm, the only vectors of that name, is near 1."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = np.round(scale * generator.standard_normal(shape) / GRID) * GRID
    return (values + (len(shape) == 1 and name.endswith("weight"))).astype(np.float32)


def checksum(weights: Mapping[str, np.ndarray]) -> str:
    """A hash of all weights in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode() + np.ascontiguousarray(weights[name]).tobytes())
    return found.hexdigest()


def nanochat_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of nanochat by its name; the scales of the residual stream are near 1, its padding is not zero."""
    return random_weight(name, shape, scale=0.2) + np.float32(name == "resid_lambdas")
