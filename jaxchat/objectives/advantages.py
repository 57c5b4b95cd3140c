"""From the rewards of groups of samples to advantages and weights of tokens: what a policy gradient is given as data.

P prompts, G samples of each, N = P * G sequences, T tokens of one of them. Everything here is NumPy in float64.
"""

from typing import Literal

import numpy as np

Baseline = Literal["none", "mean", "standard", "leave_one_out"]
Aggregate = Literal["token_mean", "sequence_mean", "constant"]

STANDARD_EPSILON = 1e-4


def group_advantages(
    rewards_PG: np.ndarray, rule: Baseline, valid_PG: np.ndarray | None = None, *, epsilon: float = STANDARD_EPSILON
) -> np.ndarray:
    """How much better each sample's reward R is than the others of its prompt, (P, G).

    "none": R. "mean": R - mean (Dr. GRPO, arXiv 2503.20783). "standard": (R - mean) / (s + epsilon), s the standard
    deviation with G - 1 below the line (GRPO, arXiv 2402.03300; TRL's epsilon is 1e-4, verl's 1e-6). "leave_one_out": R
    minus the mean of the others' rewards, which is G / (G - 1) * (R - mean) (RLOO, arXiv 2402.14740).

    Samples that are not valid, or whose reward is not finite, are left out of their group's statistics and get 0; so
    does every sample of a group with a baseline where the rewards that count are all equal, or only one.
    """
    G = rewards_PG.shape[1]
    if rule == "leave_one_out" and G < 2:
        raise ValueError(
            f"leave_one_out compares a sample with the others of its prompt: samples={G} must be at least 2"
        )
    rewards_PG, valid_PG = _counted(rewards_PG, valid_PG)
    if rule == "none":
        return rewards_PG
    count_P1 = valid_PG.sum(axis=1, keepdims=True)
    mean_P1 = rewards_PG.sum(axis=1, keepdims=True) / np.maximum(count_P1, 1)
    advantages_PG = np.where(valid_PG & ~equal_groups(rewards_PG, valid_PG)[:, None], rewards_PG - mean_P1, 0)
    if rule == "mean":
        return advantages_PG
    others_P1 = np.maximum(count_P1 - 1, 1)
    if rule == "leave_one_out":
        return advantages_PG * count_P1 / others_P1
    return advantages_PG / (np.sqrt(np.sum(advantages_PG**2, axis=1, keepdims=True) / others_P1) + epsilon)


def equal_groups(rewards_PG: np.ndarray, valid_PG: np.ndarray | None = None) -> np.ndarray:
    """Whether all rewards of a prompt that count are equal, (P,): nothing can be learnt from their comparison."""
    rewards_PG, valid_PG = _counted(rewards_PG, valid_PG)
    most_P = np.max(rewards_PG, axis=1, where=valid_PG, initial=-np.inf)
    return most_P <= np.min(rewards_PG, axis=1, where=valid_PG, initial=np.inf)


def _counted(rewards_PG: np.ndarray, valid_PG: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rewards in float64 with 0 for those that do not count, and which do."""
    rewards_PG = np.asarray(rewards_PG, np.float64)
    finite_PG = np.isfinite(rewards_PG)
    valid_PG = finite_PG if valid_PG is None else finite_PG & np.asarray(valid_PG, bool)
    return np.where(valid_PG, rewards_PG, 0), valid_PG


def token_weights(lengths_N: np.ndarray, rule: Aggregate, *, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """What every trained token of a sequence weighs in the loss, and its share of the divisor, each (N,).

    The loss is sum(weight * loss of the token) / sum(share), both over all trained tokens of the batch, however cut.
    `lengths_N` counts the trained tokens of each sequence; one without any weighs nothing and is not counted.
    "token_mean": every token alike (DAPO, arXiv 2503.14476). "sequence_mean": the mean over sequences of the mean over
    their tokens (GRPO). "constant": the sum over tokens divided by sequences * `longest` (Dr. GRPO, arXiv 2503.20783).
    """
    lengths_N = np.asarray(lengths_N, np.float64)
    if longest < 1 or lengths_N.min(initial=0) < 0:
        raise ValueError(f"longest={longest} must be at least 1, and lengths ({lengths_N.min(initial=0):g}) at least 0")
    some_N = np.where(lengths_N > 0, 1.0, 0.0)
    inverse_N = some_N / np.maximum(lengths_N, 1)
    if rule == "token_mean":
        return some_N, some_N
    if rule == "sequence_mean":
        return inverse_N, inverse_N
    return some_N, longest * inverse_N


def kl_to_go(logprobs_T: np.ndarray, reference_T: np.ndarray, mask_T: np.ndarray) -> np.ndarray:
    """Sum over the trained tokens u >= t of one sequence of log policy(u) - log reference(u), for every t, in nats.

    Subtracting beta times this from the advantages, as data, makes the expected gradient of the loss that of beta *
    KL(policy || reference) over whole sequences drawn from the policy; the same estimator inside the loss would have
    the expected gradient 0, and exp(-x) + x - 1 that of the reverse KL (arXiv 2506.09477, 2512.21852). Leading axes are
    further sequences.
    """
    gap_T = np.where(mask_T, np.subtract(logprobs_T, reference_T, dtype=np.float64), 0)
    return np.cumsum(gap_T[..., ::-1], axis=-1)[..., ::-1]


def soft_overlong(lengths_N: np.ndarray, *, longest: int, cushion: int) -> np.ndarray:
    """The reward's penalty of long answers (DAPO, arXiv 2503.14476, equation 13), (N,); all lengths in tokens.

    0 up to longest - cushion, then falling evenly to -1 at `longest`.
    """
    if not 0 < cushion <= longest:
        raise ValueError(f"the cushion of {cushion} tokens must lie between 1 and longest={longest}")
    return np.clip((longest - cushion - np.asarray(lengths_N, np.float64)) / cushion, -1, 0)
