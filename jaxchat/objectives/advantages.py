"""Advantages and token weights of a policy gradient, computed from the rewards of groups of samples.

P prompts, G samples per prompt, N = P * G sequences, T tokens per sequence. Everything here is NumPy in float64.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

STANDARD_EPSILON = 1e-4  # As in TRL; verl uses 1e-6.


def _standard(rewards_PG: np.ndarray, centred_PG: np.ndarray, count_P1: np.ndarray) -> np.ndarray:
    """(R - mean) / (s + epsilon), with the standard deviation s over count - 1 (GRPO, arXiv 2402.03300)."""
    variance_P1 = np.sum(centred_PG**2, axis=1, keepdims=True) / np.maximum(count_P1 - 1, 1)
    return centred_PG / (np.sqrt(variance_P1) + STANDARD_EPSILON)


# Functions of the rewards, 0 for invalid samples; the rewards minus the mean of the prompt's valid samples; and the
# number of valid samples per prompt.
ADVANTAGES: Mapping[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "none": lambda rewards_PG, centred_PG, count_P1: rewards_PG,
    "mean": lambda rewards_PG, centred_PG, count_P1: centred_PG,  # Dr. GRPO, arXiv 2503.20783.
    "standard": _standard,
    # R minus the mean of the other samples (RLOO, arXiv 2402.14740); `RL` checks that there are other samples.
    "leave_one_out": lambda rewards_PG, centred_PG, count_P1: centred_PG * count_P1 / np.maximum(count_P1 - 1, 1),
}


def group_advantages(rewards_PG: np.ndarray, rule: str) -> np.ndarray:
    """Advantages (P, G) of samples relative to the other samples of their prompt; `rule` is a key of ADVANTAGES.

    Samples whose reward is not finite are invalid: they are excluded from the group's statistics and get 0. With a
    baseline, a group whose valid rewards are all equal (or only one) gets 0 as well.
    """
    valid_PG = np.isfinite(rewards_PG)
    count_P1 = valid_PG.sum(axis=1, keepdims=True)
    valid_rewards_PG = np.where(valid_PG, rewards_PG, 0.0)
    mean_P1 = valid_rewards_PG.sum(axis=1, keepdims=True) / np.maximum(count_P1, 1)
    centred_PG = np.where(valid_PG & ~equal_groups(rewards_PG)[:, None], valid_rewards_PG - mean_P1, 0)
    return ADVANTAGES[rule](valid_rewards_PG, centred_PG, count_P1)


def equal_groups(rewards_PG: np.ndarray) -> np.ndarray:
    """Whether all finite rewards of a prompt are equal, bool (P,): such a group gives no learning signal."""
    valid_PG = np.isfinite(rewards_PG)
    most_P = np.max(rewards_PG, axis=1, where=valid_PG, initial=-np.inf)
    return most_P <= np.min(rewards_PG, axis=1, where=valid_PG, initial=np.inf)


# Functions of 1 / length of a sequence (0 if empty) and `longest`: a token's weight and its share of the divisor.
AGGREGATES: Mapping[str, Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]] = {
    # Every token alike (DAPO, arXiv 2503.14476).
    "token_mean": lambda inverse_N, longest: (np.sign(inverse_N), np.sign(inverse_N)),
    # The mean over sequences of the mean over their tokens (GRPO).
    "sequence_mean": lambda inverse_N, longest: (inverse_N, inverse_N),
    # The sum over tokens divided by sequences * longest (Dr. GRPO, arXiv 2503.20783).
    "constant": lambda inverse_N, longest: (np.sign(inverse_N), longest * inverse_N),
}
if TYPE_CHECKING:
    Baseline = str
    Aggregate = str
else:
    Baseline, Aggregate = Literal[tuple(ADVANTAGES)], Literal[tuple(AGGREGATES)]


def token_weights(lengths_N: np.ndarray, rule: str, *, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """The weight of each trained token of a sequence in the loss, and its share of the divisor, each (N,).

    The loss is sum(weight * token loss) / sum(share), both over all trained tokens of the batch, so it does not depend
    on micro-batches. `lengths_N` counts the trained tokens of each sequence; an empty sequence gets 0 for both. `rule`
    is a key of AGGREGATES.
    """
    return AGGREGATES[rule](np.where(lengths_N > 0, 1.0, 0.0) / np.maximum(lengths_N, 1), longest)


def kl_to_go(logprobs_T: np.ndarray, reference_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    """For every t, the sum of log policy(u) - log reference(u) over the trained tokens u >= t of a sequence, in nats.

    Subtracting beta times this from the advantages adds the gradient of beta * KL(policy || reference) over whole
    sequences sampled from the policy to the expected gradient of the loss. Inside the loss, the same estimator would
    have expected gradient 0, and exp(-x) + x - 1 that of the reverse KL (arXiv 2506.09477, 2512.21852). Leading axes
    are batch axes.
    """
    gap_T = np.where(mask_T, np.subtract(logprobs_T, reference_T, dtype=np.float64), 0)
    return np.cumsum(gap_T[..., ::-1], axis=-1)[..., ::-1]


def soft_overlong(lengths_N: np.ndarray, *, longest: int, cushion: int) -> np.ndarray:
    """The reward penalty for long answers (DAPO, arXiv 2503.14476, equation 13), (N,); all lengths in tokens.

    0 up to longest - cushion, then linear down to -1 at `longest`.
    """
    return np.clip((longest - cushion - lengths_N) / cushion, -1, 0)
