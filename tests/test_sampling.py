"""Choosing the next token, beside a NumPy sort in float64."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.decode.sampling import (
    FILTERS,
    LARGEST,
    PRESETS,
    SMALLEST,
    TINY,
    History,
    SamplingParams,
    Truncation,
    beginning,
    choose,
    pack,
    penalise,
    truncate,
    warm,
)
from jaxchat.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "sampling.npz"
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
    return jax.jit(lambda z_BV, top_k_B, top_p_B: jnp.isfinite(truncate(z_BV, {"top_k": top_k_B, "top_p": top_p_B})))


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
    return jax.jit(lambda z_BV, rows, position_B: choose(z_BV, rows, position_B, level="full"))


def rows(count: int, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0) -> Any:
    """Rows that differ in the number of their sample alone."""
    params = SamplingParams(temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    return pack([(params, sample) for sample in range(count)])


def test_kept_sets_equal_those_of_transformers() -> None:
    golden = np.load(GOLDEN)
    z_BV = golden["logits"] / golden["temperature"][:, None]
    options = {name: golden.get(name, np.full(len(z_BV), getattr(Truncation(), name))) for name in FILTERS}
    kept_BV = np.isfinite(jax.jit(truncate)(z_BV, options))
    wanted_BV = np.unpackbits(golden["kept"], axis=1)[:, : z_BV.shape[1]].astype(bool)
    differ = np.flatnonzero((kept_BV != wanted_BV).any(axis=1))
    for row in differ:  # where a float32 sum meets top_p, either set is right
        one, other = (kept_by_sort(z_BV[row], golden["top_k"][row], golden["top_p"][row] + d) for d in (-2e-6, 2e-6))
        assert not np.array_equal(one, other), row
    assert len(z_BV) == 1000
    assert len(differ) < 3


def test_repetition_penalty_equals_that_of_transformers() -> None:
    golden = np.load(GOLDEN)
    count, vocab = golden["penalised"].shape
    prompt_BV = np.zeros((count, vocab), bool)
    np.put_along_axis(prompt_BV, golden["prompt"][:count].astype(int), True, axis=1)
    asked = pack([(SamplingParams(repetition_penalty=float(r)), 0) for r in golden["repetition_penalty"][:count]])
    nothing = np.zeros((count, vocab), np.int32)
    for history in (
        History(prompt_BV, nothing, nothing * 1.0),
        History(prompt_BV & False, prompt_BV * 3, nothing * 1.0),
    ):
        got_BV = jax.jit(penalise)(golden["logits"][:count], asked, history)
        np.testing.assert_allclose(got_BV, golden["penalised"], rtol=1e-6)


def test_presence_frequency_and_bias_act_as_openai_defines_them() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 2.0})
    bias, counts = np.zeros((2, 5), np.float32), np.array([[0, 1, 4, 0, 0]] * 2)
    bias[0, 3] = 2
    asked = pack([(params, 0), (SamplingParams(), 0)])
    got = jax.jit(penalise)(np.ones((2, 5), np.float32), asked, History(counts > 9, counts, bias))
    np.testing.assert_allclose(got, [[1, 0.25, -0.5, 3, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    "settings",
    [(1.0,), (0.7,), (1.3, 6), (0.7, 0, 0.8), (2.0, 9, 0.9), (1.0, 0, 1.0, 0.05), (1.5, 8, 0.95, 0.1)],
    ids=str,
)
def test_draws_have_the_right_frequencies(settings: Any) -> None:
    count = 100_000
    params = SamplingParams(settings[0], **dict(zip(FILTERS, settings[1:])))
    z_V = np.random.default_rng(7).standard_normal(12).astype(np.float32) * 1.5
    choice = sampler()(np.tile(z_V, (count, 1)), rows(count, *settings, seed=11), np.zeros(count, np.int32))
    z_V = z_V.astype(np.float64) / params.temperature
    kept_V = kept_by_sort(z_V, params.top_k, params.top_p)
    kept_V &= np.exp(z_V - z_V.max()) >= params.min_p
    p_V = np.where(kept_V, np.exp(z_V), 0)
    p_V /= p_V.sum()
    counts_V = np.bincount(choice.token_B, minlength=12)
    assert not np.any(counts_V[~kept_V])
    freedom = kept_V.sum() - 1
    assert freedom > 1
    chi_square = np.sum((counts_V - count * p_V)[kept_V] ** 2 / (count * p_V[kept_V]))
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)
    np.testing.assert_allclose(choice.sampling_logprob_B, np.log(p_V[choice.token_B]), atol=1e-5)


def test_temperature_zero_is_greedy_whatever_else_is_asked() -> None:
    z_BV = np.random.default_rng(1).standard_normal((200, 12)).astype(np.float32)
    z_BV[0] = 0  # the first of equals
    for top_k, top_p in ((0, 1.0), (3, 0.5)):
        choice = sampler()(z_BV, rows(200, 0.0, top_k, top_p), np.zeros(200, np.int32))
        np.testing.assert_array_equal(choice.token_B, z_BV.argmax(axis=1))
        np.testing.assert_array_equal(choice.sampling_logprob_B, 0)
        expected = z_BV.max(axis=1) - np.log(np.exp(z_BV).sum(axis=1))
        np.testing.assert_allclose(choice.logprob_B, expected, atol=1e-5)


def test_a_row_depends_on_itself_alone_and_not_on_the_level() -> None:
    z_BV = np.tile(np.random.default_rng(2).standard_normal(12).astype(np.float32), (200, 1))
    at = np.arange(200) % 7
    plain = rows(200, 1.0, seed=2**40 + 3)
    first = sampler()(z_BV, plain, at).token_B
    assert len(np.unique(first)) > 4, "samples share their noise"
    np.testing.assert_array_equal(first, sampler()(z_BV, plain, at).token_B)
    for changed in (rows(200, 1.0, seed=3), rows(200, 1.0, seed=2**40 + 4)):
        assert np.any(sampler()(z_BV, changed, at).token_B != first)
    assert np.any(sampler()(z_BV, plain, at + 7).token_B != first)
    other = rows(200, 0.5, 3, 0.9, seed=5)
    mixed = jax.tree.map(lambda mine, theirs: np.where(np.arange(200) < 100, mine, theirs), plain, other)
    tokens = sampler()(z_BV, mixed, at).token_B
    np.testing.assert_array_equal(tokens[:100], first[:100])
    assert np.any(tokens[100:] != first[100:])
    lower = jax.jit(lambda z_BV, rows, at: choose(z_BV, rows, at, level="plain"))(z_BV, plain, at)
    np.testing.assert_array_equal(lower.token_B, first)


def test_the_courses_worked_examples() -> None:
    def probabilities(logits: list[float], params: SamplingParams) -> np.ndarray:
        rows = pack([(params, 0)])
        return np.asarray(jax.nn.softmax(truncate(warm(jnp.array([logits]), rows), rows.filters)))[0]

    for temperature, right in ((1.0, [0.63, 0.23, 0.14]), (2.0, [0.48, 0.29, 0.23])):
        np.testing.assert_allclose(probabilities([2.0, 1.0, 0.5], SamplingParams(temperature)), right, atol=0.005)
    got = probabilities([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79], SamplingParams(top_k=3))
    np.testing.assert_allclose(got, [0.061, 0, 0, 0.578, 0, 0, 0, 0.361, 0], atol=0.0005)
    got = probabilities(np.log([0.5, 0.3, 0.15, 0.04, 0.01]).tolist(), SamplingParams(top_p=0.9))
    np.testing.assert_array_equal(got > 0, [1, 1, 1, 0, 0])
    course = SamplingParams(**PRESETS["course"])
    assert (course.temperature, course.top_k, course.top_p) == (1.0, 50, 0.95)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", float("inf")),
        ("presence_penalty", float("-inf")),
        ("frequency_penalty", float("-inf")),
        ("logit_bias", {2: float("nan")}),
        ("seed", -1),
        ("stop", "a text"),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop_tokens", ("a",)),
        ("stop", 5),
        ("stop", None),
        ("stop_tokens", 5),
        ("stop_tokens", (True,)),
        ("logit_bias", [3]),
        ("logit_bias", {"a": 1.0}),
        ("temperature", "warm"),
        ("temperature", None),
        ("max_tokens", 2.5),
        ("top_k", 1.5),
        ("seed", 0.5),
        ("seed", True),
        # 0 or infinity in float32, which computes.
        ("top_p", 1e-38),
        ("top_p", 1e-46),
        ("temperature", 1e39),
        ("repetition_penalty", 1e-39),
        ("repetition_penalty", 1e39),
        ("presence_penalty", 1e39),
        ("frequency_penalty", -1e39),
        ("logit_bias", {2: 1e39}),
    ],
)
def test_a_parameter_out_of_range_or_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "name", ["presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p"]
)
@pytest.mark.parametrize("largest", [True, False])
def test_a_sample_at_the_limits_has_a_finite_probability(name: str, largest: bool) -> None:
    least = {"repetition_penalty": SMALLEST, "temperature": 0.0, "top_p": TINY}.get(name, -LARGEST)
    params = SamplingParams(**{name: (1.0 if name == "top_p" else LARGEST) if largest else least})
    history = beginning([([1, 2], params)], rows=1, vocab=8)._replace(counts_BV=np.full((1, 8), 1000))
    logits = np.linspace(-15, 15, 8, dtype=np.float32)[None]
    chosen = choose(logits, pack([(params, 0)]), np.zeros(1, np.int32), level="full", history=history)
    assert np.isfinite(chosen.logprob_B).all() and np.isfinite(chosen.sampling_logprob_B).all()
    if name == "top_p" and not largest:
        assert chosen.token_B[0] == 7


def test_numbers_of_numpy_are_numbers() -> None:
    given = SamplingParams(
        np.float32(0.5), top_k=np.int32(3), seed=np.int64(7), logit_bias={np.int64(2): np.float32(1.5)}
    )
    assert given == SamplingParams(0.5, top_k=3, seed=7, logit_bias={2: 1.5})
