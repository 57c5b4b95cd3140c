"""Advantages of groups and weights of tokens, beside verl's, and what the published rules have in common."""

from typing import Any

import numpy as np
import outside
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.objectives.advantages import equal_groups, group_advantages, kl_to_go, soft_overlong, token_weights

RULES = ("none", "mean", "standard", "leave_one_out")
GOLDEN = outside.read_arrays("policy")


@pytest.mark.parametrize("rule", RULES)
def test_advantages_equal_verls(rule: Any) -> None:
    rewards = GOLDEN["rewards"]
    assert np.any(GOLDEN["advantages/standard"] < 0) and np.any(~GOLDEN["valid"])
    np.testing.assert_allclose(group_advantages(rewards, rule), GOLDEN[f"advantages/{rule}"], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_do_not_count_are_left_out_of_their_group(rule: Any, bad: float) -> None:
    """verl with groups that lack them; a reward that is not finite does not count by itself."""
    rewards, valid = GOLDEN["rewards"], GOLDEN["valid"]
    assert set(valid.sum(axis=1)) >= {1, 2, 3}
    found = group_advantages(np.where(valid, rewards, bad), rule)
    alone = valid & (valid.sum(axis=1, keepdims=True) == 1) & (rule != "none")
    expected = np.where(alone, 0, GOLDEN[f"advantages_of_valid/{rule}"])  # verl has no baseline for one sample
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15)


def test_rloo_of_tunixs_test_vector() -> None:
    """The numbers of google/tunix, whose test has them too."""
    rewards = np.arange(1.0, 7).reshape(2, 3)
    np.testing.assert_allclose(group_advantages(rewards, "leave_one_out"), [[-1.5, 0, 1.5]] * 2, atol=1e-15)


@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("reward", [0.0, 0.1, -7.3])
def test_a_group_of_equal_rewards_has_no_advantage(rule: Any, reward: float) -> None:
    rewards = np.array([[reward] * 3, [reward, reward, np.nan], [reward, np.nan, 5]])
    found = group_advantages(rewards, rule)
    assert not np.any(found[:2]), "not even by rounding"
    assert found[2, 0] < 0 < found[2, 2] and found[2, 1] == 0
    np.testing.assert_array_equal(equal_groups(rewards), [True, True, False])


def test_a_group_without_a_valid_sample_teaches_nothing() -> None:
    rewards = np.full((2, 2), np.nan)
    np.testing.assert_array_equal(equal_groups(rewards), [True, True])
    for rule in RULES:
        assert not np.any(group_advantages(rewards, rule))  # type: ignore


def test_one_sample_a_prompt_has_nothing_to_be_compared_with() -> None:
    assert not np.any(group_advantages(np.ones((3, 1)), "standard"))
    np.testing.assert_array_equal(group_advantages(np.ones((3, 1)), "none"), np.ones((3, 1)))


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(deadline=None)
@given(lengths=lengths, longest=st.integers(1, 12), seed=st.integers(0, 9))
def test_token_weights_are_the_published_means(lengths: list[int], longest: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((len(lengths), 9)) * (
        np.arange(9) < np.array(lengths)[:, None]
    )
    sums, some = values.sum(axis=1), np.array(lengths) > 0
    means = {
        "token_mean": sums.sum() / max(sum(lengths), 1),
        "sequence_mean": (sums / np.maximum(lengths, 1)).sum() / max(some.sum(), 1),
        "constant": sums.sum() / (max(some.sum(), 1) * longest),
    }
    for rule, expected in means.items():
        weight, share = token_weights(np.array(lengths), rule, longest=longest)  # type: ignore
        assert np.all((weight > 0) == some) and np.all((share > 0) == some)
        total, divisor = (weight * sums).sum(), (share * lengths).sum()
        np.testing.assert_allclose(total / max(divisor, 1e-9), expected, rtol=1e-12, atol=1e-14)


def test_the_penalty_of_long_answers_falls_from_the_cushion_to_the_end() -> None:
    found = soft_overlong(np.arange(0, 26), longest=20, cushion=8)
    assert not np.any(found[:13]) and np.all(found[20:] == -1)
    np.testing.assert_allclose(np.diff(found[12:21]), -1 / 8)


def test_the_penalty_to_go_starts_with_the_sequences_and_skips_what_is_not_trained() -> None:
    generator = np.random.default_rng(0)
    ours, reference = generator.standard_normal((2, 3, 7))
    mask = generator.random((3, 7)) < 0.6
    found = kl_to_go(np.where(mask, ours, np.nan), np.where(mask, reference, np.inf), mask)
    gap = np.where(mask, ours - reference, 0)
    np.testing.assert_allclose(found[:, 0], gap.sum(axis=1))
    np.testing.assert_allclose(found[:, :-1] - found[:, 1:], gap[:, :-1], atol=1e-12)
    np.testing.assert_allclose(found[:, -1], gap[:, -1])
