"""Choosing the next token, beside a NumPy sort in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.config import UserError
from jaxchat.decode.sampling import SamplingParams, keep, sample

ROWS, VOCAB = 64, 37


def kept_by_sort(z_V: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The k largest and whatever ties with the last of them; of those, the most likely until their mass is p."""
    z_V = z_V.astype(np.float64)
    if top_k:
        z_V = np.where(z_V >= np.sort(z_V)[::-1][min(top_k, len(z_V)) - 1], z_V, -np.inf)
    p_V = np.exp(z_V - z_V.max())
    p_V /= p_V.sum()
    order_V = np.argsort(-p_V, kind="stable")
    crossing = np.searchsorted(np.cumsum(p_V[order_V]), top_p)
    least = 0 if top_p >= 1 else z_V[order_V[min(crossing, len(z_V) - 1)]]
    return np.isfinite(z_V) & ((top_p >= 1) | (z_V >= least))


@functools.cache
def keeper() -> Any:
    return jax.jit(lambda z_BV, top_k_B, top_p_B: jnp.isfinite(keep(z_BV, top_k_B, top_p_B)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 1.0, 8.0, 1e4]), st.booleans())
def test_kept_sets_equal_those_of_a_sort(seed: int, scale: float, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    z_BV = (scale * generator.standard_normal((ROWS, VOCAB))).astype(np.float32)
    if ties:
        z_BV = np.round(z_BV / scale) * np.float32(scale) + np.float32(0)
    top_k_B = generator.integers(0, VOCAB + 5, ROWS) * generator.integers(0, 2, ROWS)
    top_p_B = np.where(generator.random(ROWS) < 0.3, 1.0, generator.uniform(0.001, 1, ROWS)).astype(np.float32)
    kept_BV = np.asarray(keeper()(z_BV, top_k_B, top_p_B))
    exact = 0
    for z_V, k, p, kept_V in zip(z_BV, top_k_B, top_p_B, kept_BV):
        # Masses are summed in float32: where the border is that close, either set is right.
        fewer_V, more_V = (kept_by_sort(z_V, k, float(p) + shift) for shift in (-2e-6, 2e-6 if p < 1 else 0))
        assert np.all(fewer_V <= kept_V) and np.all(kept_V <= more_V), (k, p)
        assert kept_V[z_V.argmax()]
        exact += np.array_equal(fewer_V, more_V)
    assert exact > ROWS // 2, "too few rows that tell"


def test_ties_at_the_border_are_kept() -> None:
    z_BV = np.log(np.array([[4, 2, 2, 1, 1]] * 4, np.float32) / 10)
    kept_BV = keeper()(z_BV, np.array([2, 1, 0, 0]), np.array([1, 1, 0.5, 0.85], np.float32))
    np.testing.assert_array_equal(kept_BV, np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1] * 5], bool))


@functools.cache
def sampler() -> Any:
    return jax.jit(sample)


def rows(count: int, temperature: float, top_k: int = 0, top_p: float = 1.0) -> dict[str, Any]:
    return {
        "temperature": np.full(count, temperature, np.float32),
        "top_k": np.full(count, top_k, np.int32),
        "top_p": np.full(count, top_p, np.float32),
    }


@pytest.mark.parametrize(
    "settings", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 6, 1.0), (0.7, 0, 0.8), (2.0, 9, 0.9)], ids=str
)
def test_draws_have_the_right_frequencies(settings: tuple[float, int, float]) -> None:
    count, (temperature, top_k, top_p) = 20_000, settings
    z_V = np.random.default_rng(7).standard_normal(12).astype(np.float32) * 1.5
    keys = jax.random.split(jax.random.key(11), count)
    drawn = sampler()(np.tile(z_V, (count, 1)), keys, rows(count, *settings))
    kept_V = kept_by_sort(z_V / np.float32(temperature), top_k, top_p)
    p_V = np.where(kept_V, np.exp(z_V.astype(np.float64) / temperature), 0)
    p_V /= p_V.sum()
    counts_V = np.bincount(drawn, minlength=12)
    assert not np.any(counts_V[~kept_V])
    freedom = kept_V.sum() - 1
    chi_square = np.sum((counts_V - count * p_V)[kept_V] ** 2 / (count * p_V[kept_V]))
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_temperature_zero_is_greedy_whatever_else_is_asked() -> None:
    z_BV = np.random.default_rng(1).standard_normal((200, 12)).astype(np.float32)
    z_BV[0] = 0  # the first of equals
    keys = jax.random.split(jax.random.key(0), 200)
    for top_k, top_p in ((0, 1.0), (3, 0.5)):
        np.testing.assert_array_equal(sampler()(z_BV, keys, rows(200, 0.0, top_k, top_p)), z_BV.argmax(axis=1))


def test_a_row_depends_on_its_own_key_and_parameters_alone() -> None:
    z_BV = np.random.default_rng(2).standard_normal((200, 12)).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), 200)
    asked = rows(200, 1.0)
    first, again = sampler()(z_BV, keys, asked), sampler()(z_BV, keys, asked)
    np.testing.assert_array_equal(first, again)
    others = {name: np.where(np.arange(200) < 100, column, column * 0 + 1) for name, column in rows(200, 0.5).items()}
    others = {name: np.where(np.arange(200) < 100, asked[name], column) for name, column in others.items()}
    noise = jax.random.split(jax.random.key(6), 200)
    mixed = sampler()(z_BV, jnp.where(np.arange(200) < 100, keys, noise), others)
    np.testing.assert_array_equal(mixed[:100], first[:100])
    assert np.any(mixed[100:] != first[100:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("max_tokens", 0),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        SamplingParams(**{name: value})
