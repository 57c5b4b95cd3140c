"""Configuration of the optimizer: parameter groups and the learning rate schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

REFERENCE_STEPS = 2520  # Steps of nanochat at depth 12.
LEAST_STEPS = 40  # A shorter run would get higher learning rates than were ever tested.


def _check_numbers(config: Any, *, finite: Sequence[str], shares: Sequence[str]) -> None:
    """Raises ValueError for a field that is negative or not finite, and for a share that is not in [0, 1)."""
    for name, most in (*((name, math.inf) for name in finite), *((name, 1) for name in shares)):
        value = getattr(config, name)
        if not 0 <= value < most:
            limit = "finite" if most == math.inf else "below 1"
            raise ValueError(f"{name}={value} must be at least 0 and {limit}")


@dataclass(frozen=True)
class AdamW:
    """One AdamW group (arXiv:1711.05101)."""

    learning_rate: float  # Before the schedule and the optimizer's scale.
    b1: float = 0.8  # Decay of the first moment.
    b2: float = 0.95  # Decay of the second moment.
    weight_decay: float = 0.0  # Decoupled, times the learning rate.
    eps: float = 1e-10  # Added to the root of the second moment.

    def __post_init__(self) -> None:
        _check_numbers(self, finite=("learning_rate", "weight_decay", "eps"), shares=("b1", "b2"))
        if self.eps == 0:
            raise ValueError("eps=0 must be positive: it keeps the first updates finite")


@dataclass(frozen=True)
class Muon:
    """Muon for every matrix of the layers; each flag enables an extension of the original Muon."""

    learning_rate: float = 0.02  # Before the schedule and the optimizer's scale.
    weight_decay: float = 0.28  # At the first step; it falls with the learning rate.
    momentum_first: float = 0.85  # Momentum at the first step.
    momentum: float = 0.97  # Momentum after momentum_warmup steps.
    momentum_last: float = 0.90  # Momentum at the last step.
    momentum_warmup: int = 400  # Steps over which the momentum rises.
    b2: float = 0.9  # Decay of the second moment of `variance`.
    equilibrate: bool = True  # Give all rows of a gradient the same norm (arXiv:2603.28254).
    renormalise: bool = True  # Scale updates to the norm of an orthogonal matrix.
    variance: bool = True  # Divide by running mean squares of rows or columns (NorMuon).
    polar_express: bool = True  # Polar Express instead of Newton-Schulz coefficients.

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
    warmup_steps: int = 40  # Steps over which the learning rates rise.
    warmdown_fraction: float = 0.65  # Share of the steps over which they fall.
    final_fraction: float = 0.05  # Share of the learning rates that is left at the end.
    clip: float | None = None  # Largest norm of the gradient; None does not clip.
    scale: float = 1.0  # Factor of every learning rate.
    steps_exponent: float = 0.0  # Exponent of (2520 / steps) in a factor of every learning rate.
    router: AdamW = AdamW(0.005)  # Of the routers of experts.
    selection_bias: float = 0.006  # Step of the selection biases of experts, a learning rate.

    def __post_init__(self) -> None:
        if not 0 <= self.warmdown_fraction <= 1:
            raise ValueError(f"warmdown_fraction={self.warmdown_fraction} must lie between 0 and 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not be negative")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip={self.clip} must be positive and finite, or None")
        _check_numbers(self, finite=("final_fraction", "scale", "steps_exponent", "selection_bias"), shares=())


def peak_factor(config: Optimizer, steps: int) -> float:
    """Factor of every learning rate after warm-up in a run of `steps` steps."""
    return config.scale * (REFERENCE_STEPS / max(steps, LEAST_STEPS)) ** config.steps_exponent
