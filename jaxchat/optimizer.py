"""Configuration of the optimizer: parameter groups and the learning rate schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REFERENCE_STEPS = 2520  # Steps of nanochat at depth 12.
LEAST_STEPS = 40  # A shorter run would get higher learning rates than were ever tested.


@dataclass(frozen=True)
class AdamW:
    """One AdamW group (arXiv:1711.05101)."""

    learning_rate: float
    b1: float = 0.8
    b2: float = 0.95
    weight_decay: float = 0.0
    eps: float = 1e-10

    def __post_init__(self) -> None:
        _check_numbers(self, finite=("learning_rate", "weight_decay", "eps"), shares=("b1", "b2"))
        if self.eps == 0:
            raise ValueError("eps=0 must be positive: it keeps the first updates finite")


@dataclass(frozen=True)
class Muon:
    """Muon for every matrix of the layers; each flag enables an extension of the original Muon."""

    learning_rate: float = 0.02
    weight_decay: float = 0.28
    momentum_first: float = 0.85
    momentum: float = 0.97
    momentum_last: float = 0.90
    momentum_warmup: int = 400
    b2: float = 0.9
    equilibrate: bool = True
    renormalise: bool = True
    variance: bool = True
    polar_express: bool = True

    def __post_init__(self) -> None:
        shares = ("momentum_first", "momentum", "momentum_last", "b2")
        _check_numbers(self, finite=("learning_rate", "weight_decay", "momentum_warmup"), shares=shares)


@dataclass(frozen=True)
class Optimizer:
    """Parameter groups and the learning rate schedule: warm-up, constant, linear warm-down to a fraction.

    Every learning rate is multiplied by `scale` and by (REFERENCE_STEPS / steps) ** `steps_exponent`, so that short
    runs use higher rates. Runs of fewer than LEAST_STEPS steps count as LEAST_STEPS.
    """

    muon: Muon | None
    head: AdamW
    embed: AdamW
    value_embeddings: AdamW
    resid_scale: AdamW
    x0_scale: AdamW
    scalars: AdamW
    warmup_steps: int = 40
    warmdown_fraction: float = 0.65
    final_fraction: float = 0.05
    clip: float | None = None
    scale: float = 1.0
    steps_exponent: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmdown_fraction <= 1:
            raise ValueError(f"warmdown_fraction={self.warmdown_fraction} must lie between 0 and 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not be negative")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip={self.clip} must be positive and finite, or None")
        _check_numbers(self, finite=("final_fraction", "scale", "steps_exponent"), shares=())


def peak_factor(config: Optimizer, steps: int) -> float:
    """Factor of every learning rate after warm-up in a run of `steps` steps."""
    return config.scale * (REFERENCE_STEPS / max(steps, LEAST_STEPS)) ** config.steps_exponent


def _check_numbers(config: Any, *, finite: Sequence[str], shares: Sequence[str]) -> None:
    """Raises ValueError for a field that is negative or not finite, and for a share that is not in [0, 1)."""
    for name, most in (*((name, math.inf) for name in finite), *((name, 1) for name in shares)):
        value = getattr(config, name)
        if not 0 <= value < most:
            limit = "finite" if most == math.inf else "below 1"
            raise ValueError(f"{name}={value} must be at least 0 and {limit}")
