"""Surrogate losses beside TRL's and verl's, and what they have in common on the first step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest

from jaxchat.objectives.advantages import group_advantages, token_weights
from jaxchat.objectives.policy import OBJECTIVES, Policy, surrogate

GOLDEN = outside.read_arrays("policy")
PLACED = ("trl/rloo", "trl/grpo", "trl/dr_grpo", "trl/dapo", "trl/gspo")
PLACED += ("verl/reinforce", "verl/reinforce_mean", "verl/ppo", "verl/gspo")
ADDED = {"verl/gspo": 1e-8}  # verl adds this to the length of a sequence before it divides
LONGEST = 20


class Packed:
    """The golden sequences, two to a row in another order, between segments and tokens that nothing trains."""

    def __init__(self, dtype: Any) -> None:
        mask_NT = GOLDEN["mask"]
        self.dtype, self.mask_NT = dtype, mask_NT
        N, T = mask_NT.shape
        order = np.random.default_rng(0).permutation(N)
        self.row_N, self.start_N = np.empty(N, int), np.empty(N, int)
        for place, sequence in enumerate(order):
            self.row_N[sequence], self.start_N[sequence] = place // 2, 2 + (place % 2) * (T + 1)
        self.shape = (N // 2, 2 * T + 6)
        self.segments_BT = np.zeros(self.shape, np.int32)
        for row, start in zip(self.row_N, self.start_N, strict=True):
            self.segments_BT[row, start:] += 1

    def column(self, values_NT: np.ndarray, elsewhere: float) -> np.ndarray:
        out_BT = np.full(self.shape, elsewhere, self.dtype)
        for n, (row, start) in enumerate(zip(self.row_N, self.start_N, strict=True)):
            place = out_BT[row, start : start + self.mask_NT.shape[1]]
            place[self.mask_NT[n]] = values_NT[n][self.mask_NT[n]]
        return out_BT

    def sequences(self, values_BT: np.ndarray) -> np.ndarray:
        width = self.mask_NT.shape[1]
        rows = zip(self.row_N, self.start_N, strict=True)
        return np.stack([values_BT[row, start : start + width] for row, start in rows])

    def batch(self, policy: Policy, old_NT: np.ndarray, elsewhere: float = np.nan) -> dict[str, np.ndarray]:
        wide = lambda values: np.broadcast_to(np.ravel(values)[:, None], self.mask_NT.shape)  # noqa: E731
        weights, norms = token_weights(self.mask_NT.sum(axis=1), policy.aggregate, longest=LONGEST)
        return {
            "segments": self.segments_BT,
            "weights": self.column(wide(weights), 0),
            "norms": self.column(wide(norms), elsewhere),
            "advantages": self.column(wide(group_advantages(GOLDEN["rewards"], policy.advantage)), elsewhere),
            "old_logprobs": self.column(old_NT, elsewhere),
        }


def loss_and_gradient(policy: Policy, packed: Packed, old_NT: np.ndarray) -> Any:
    """The mean loss, its gradient by the log-probabilities as (N, T), and what is logged."""
    batch = packed.batch(policy, old_NT)

    def mean(logprobs_BT: Any) -> Any:
        found = surrogate(policy, logprobs_BT, batch)
        return found.total / found.weight, found

    logprobs_BT = packed.column(GOLDEN["logprobs"], np.nan)
    (loss, found), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(logprobs_BT)
    assert not np.any(np.asarray(gradient)[batch["weights"] == 0])
    means = {name: float(value) / float(weight) for name, (value, weight) in found.statistics.items()}
    return float(loss), packed.sequences(np.asarray(gradient)), means, float(found.statistics["ratio"][1])


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", PLACED)
def test_losses_and_gradients_equal_trls_and_verls(name: str, dtype: Any) -> None:
    policy, old = OBJECTIVES[name.split("/")[1]], GOLDEN[f"old/{name.split('/')[1]}"]
    with jax.enable_x64(dtype == np.float64):
        loss, gradient, means, tokens = loss_and_gradient(policy, Packed(dtype), old)
    tolerance = ADDED.get(name, 1e-12) if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(loss, GOLDEN[f"{name}/loss"], rtol=tolerance, atol=tolerance)
    expected = GOLDEN[f"{name}/gradient"]
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert tokens == GOLDEN["mask"].sum()
    if name != "trl/rloo" and name != "trl/gspo":  # they count sequences
        np.testing.assert_allclose(means["clipped"], GOLDEN[f"{name}/clipped"], rtol=1e-6)


def test_the_golden_ratios_bind_both_sides_of_every_clip() -> None:
    mask = GOLDEN["mask"]
    for name, policy in OBJECTIVES.items():
        gap = GOLDEN["logprobs"] - GOLDEN[f"old/{name}"]
        if policy.ratio == "sequence":
            gap = np.sum(gap * mask, axis=1, keepdims=True) / mask.sum(axis=1, keepdims=True)
        if policy.ratio == "sequence_sum":
            gap = np.sum(gap * mask, axis=1, keepdims=True)
        ratio, better = np.exp(gap), GOLDEN[f"advantages/{policy.advantage}"].reshape(-1, 1) > 0
        if policy.ratio == "none":
            continue
        for side in (ratio < 1 - (policy.clip_low or 0), ratio > 1 + (policy.clip_high or 0)):
            for sign in (better, ~better):
                assert np.any(side & sign & mask), name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_first_step_has_ratio_one_and_clips_nothing(name: str) -> None:
    with jax.enable_x64(True):
        _, _, means, _ = loss_and_gradient(OBJECTIVES[name], Packed(np.float64), GOLDEN["logprobs"])
    assert (means["ratio"], means["clipped"], means["kl_old"]) == (1, 0, 0)


@pytest.mark.parametrize("rule", ["token_mean", "sequence_mean", "constant"])
def test_the_first_gradients_of_grpo_without_std_reinforce_and_rloo_are_one(rule: Any) -> None:
    G = GOLDEN["rewards"].shape[1]
    policies = {
        "grpo": dataclasses.replace(OBJECTIVES["grpo"], advantage="mean", aggregate=rule),
        "reinforce": dataclasses.replace(OBJECTIVES["reinforce_mean"], aggregate=rule),
        "rloo": dataclasses.replace(OBJECTIVES["rloo"], ratio="token", aggregate=rule),
        "ppo": dataclasses.replace(OBJECTIVES["ppo"], aggregate=rule),
        "dr_grpo": dataclasses.replace(OBJECTIVES["dr_grpo"], aggregate=rule),
    }
    with jax.enable_x64(True):
        found = {
            name: loss_and_gradient(policy, Packed(np.float64), GOLDEN["logprobs"])[1]
            for name, policy in policies.items()
        }
        whole = loss_and_gradient(OBJECTIVES["rloo"], Packed(np.float64), GOLDEN["logprobs"])[1]
    found["rloo"] = found["rloo"] * (G - 1) / G
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, found["grpo"], rtol=1e-12, atol=1e-16, err_msg=name)
    if rule == "constant":  # the ratio of whole sequences is the sum over tokens
        np.testing.assert_allclose(whole * (G - 1) / G / LONGEST, found["grpo"], rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_tokens_that_nothing_trains_leave_no_trace(name: str) -> None:
    """A batch without weight, of numbers that are not finite, has loss 0 and gradient 0."""
    packed = Packed(np.float32)
    batch = packed.batch(OBJECTIVES[name], GOLDEN["logprobs"]) | {"weights": np.zeros(packed.shape, np.float32)}
    logprobs = np.full(packed.shape, -np.inf, np.float32)
    total = lambda logprobs: surrogate(OBJECTIVES[name], logprobs, batch).total  # noqa: E731
    value, gradient = jax.value_and_grad(total)(logprobs)
    found = surrogate(OBJECTIVES[name], jnp.asarray(logprobs), batch)
    assert (float(value), float(found.weight)) == (0, 0)
    assert not np.any(gradient)
    assert all(float(value) == float(weight) == 0 for value, weight in found.statistics.values())


@pytest.mark.parametrize("gap", [-300.0, 300.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ratios_beyond_all_bounds_stay_finite(name: str, gap: float) -> None:
    packed = Packed(np.float32)
    batch = packed.batch(OBJECTIVES[name], GOLDEN["logprobs"] - gap)
    logprobs = packed.column(GOLDEN["logprobs"], 0)
    found, gradient = jax.value_and_grad(lambda x: surrogate(OBJECTIVES[name], x, batch).total)(logprobs)
    assert np.isfinite(found) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": "none"}, "clip_low=0.2 has no effect with ratio=none: set clip_low to None"),
        ({"clip_high": 0.0}, "clip_high=0.0 must be positive"),
        ({"clip_low": float("nan")}, "clip_low=nan must be positive"),
        ({"dual_clip": 1.1}, r"dual_clip=1.1 must be above 1 \+ clip_high=0.2"),
        ({"ratio": "sequence_sum"}, "requires aggregate=sequence_mean, not token_mean"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**fields)
