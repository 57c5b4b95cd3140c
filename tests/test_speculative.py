"""Speculation: the same tokens as without it, from right and wrong guesses, greedy and drawn; and when it rests."""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import exports
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from letters import Letters

from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.decode.speculative import AcceptanceTracker, Speculation, lookup, repeats
from jaxchat.decode.tools import Calculator
from jaxchat.errors import UserError
from jaxchat.loading import load_engine
from jaxchat.model import Transformer
from jaxchat.model.attention import GroupedQueryAttention
from jaxchat.sharding import Mesh, make_mesh

SHAPE = EngineConfig(length=160, slots=3, steps=8, prefill_chunk=32, adapt=False)
ALWAYS = Speculation(tokens=4, ngram=1, rounds=3, least=0.0)
TOOL = {"python_start": 50, "python_end": 51, "output_start": 52, "output_end": 53}


def make(config: Any, speculation: Speculation | None = ALWAYS, *, slots: int = 3, **about: Any) -> Engine:
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    shape = dataclasses.replace(SHAPE, slots=slots)
    return Engine(Transformer(config), params, Letters(**TOOL), shape, speculation=speculation, **about)  # type: ignore


def requests() -> list[Request]:
    """Texts that repeat themselves, and texts that do not."""
    generator = np.random.default_rng(0)
    kinds = (
        SamplingParams(0.0, max_tokens=60),
        SamplingParams(0.3, max_tokens=40, seed=3),
        SamplingParams(1.2, top_k=8, top_p=0.9, max_tokens=33, seed=2, ignore_end=True),
        SamplingParams(0.0, max_tokens=300),
    )
    repeated = [1, 2, 3, 4, 5, 6] * 6
    prompts = [repeated, repeated[:17], generator.integers(1, 60, 30).tolist(), generator.integers(1, 60, 45).tolist()]
    return [Request(prompt, params) for params in kinds for prompt in prompts]


@functools.cache
def plain(config: Any) -> Engine:
    """An engine that does not guess."""
    return make(config, None)


JULY = small.july2026(depth=2)


def drafts(config: Any) -> dict[str, Any]:
    """No draft model, the model itself, and one that knows nothing."""
    params, other = (jax.tree.map(jnp.asarray, small.parameters(config, seed=seed)) for seed in (0, 9))
    return {"lookup": None, "itself": (Transformer(config), params), "stranger": (Transformer(config), other)}


@pytest.mark.parametrize(
    ("config", "guesser"),
    [(JULY, "lookup"), (JULY, "itself"), (JULY, "stranger"), (small.mixed(), "lookup"), (small.latent(), "lookup")],
    ids=["july2026-lookup", "july2026-itself", "july2026-stranger", "mixed-lookup", "latent-lookup"],
)
def test_speculation_changes_no_token(config: Any, guesser: str) -> None:
    expected = plain(config).generate(requests())
    engine = make(config, draft=drafts(config)[guesser])
    counts = small.dispatches(engine)
    for (with_it,), (without,) in zip(engine.generate(requests()), expected):
        assert with_it.tokens == without.tokens
        assert with_it.finish_reason == without.finish_reason
        np.testing.assert_allclose(with_it.logprobs, without.logprobs, atol=1e-4)
        np.testing.assert_allclose(with_it.sampling_logprobs, without.sampling_logprobs, atol=1e-4)
    assert counts["useful steps"] == sum(len(answer.tokens) - 1 for (answer,) in expected)
    if guesser == "itself":
        before, full = counts["dispatches"], -(-59 // (ALWAYS.tokens + 1)) / ALWAYS.rounds
        engine.generate(requests()[:1])
        assert counts["dispatches"] - before == np.ceil(full), "a model that guesses itself is always right"


def test_a_draft_pauses_while_guesses_are_rejected_and_then_knows_what_was_decoded_without_it() -> None:
    config, request = JULY, Request([1, 2, 3] * 5, SamplingParams(0.0, max_tokens=97, ignore_end=True))
    found = {}
    for guesser, least in (("stranger", 0.0), ("stranger", 1.0), ("itself", 5.0)):
        engine = make(config, dataclasses.replace(ALWAYS, least=least), slots=1, draft=drafts(config)[guesser])
        counts = small.dispatches(engine)
        engine.generate([request])
        found[guesser, least] = counts["dispatches"]
    assert found["stranger", 0.0] == 96 / ALWAYS.rounds, "no guess is accepted, and none is left out"
    assert found["stranger", 1.0] < 20, "most dispatches decode 8 steps without guesses"
    # 15 tokens, a pause of 4 * 8, 15 tokens, a pause of 8 * 8, of which 34 are left.
    assert found["itself", 5.0] == 1 + 4 + 1 + np.ceil(34 / 8), "after a pause every guess is accepted again"


@pytest.mark.parametrize("guesser", ["lookup", "stranger"])
def test_what_is_remembered_holds_no_guess(guesser: str) -> None:
    engine = make(JULY, draft=drafts(JULY)[guesser])
    seen = [answer.tokens[20:40] for (answer,) in plain(JULY).generate(requests()[:4])]
    asked = [
        Request(one.prompt, dataclasses.replace(one.sampling, stop_tokens=tokens[i : i + 1]), store=True)
        for i, (one, tokens) in enumerate(zip(requests(), seen))
    ]
    answers = [answer for (answer,) in engine.generate(asked)]
    assert len(engine.prefixes) == 4
    for tokens, cache in engine.prefixes._held.items():
        assert cache.length_B.tolist() == [len(tokens)]
        assert cache.last_B.tolist() == [tokens[-1]]
    longer = [Request([*one.prompt, *answer.tokens, 7], one.sampling) for one, answer in zip(asked, answers)]
    before = engine.prompt_stats.reused
    again = engine.generate(longer)
    assert engine.prompt_stats.reused > before
    assert [one.tokens for (one,) in again] == [one.tokens for (one,) in plain(JULY).generate(longer)]


def test_penalties_and_tools_go_on_without_guesses() -> None:
    asked = [
        Request([1, 2, 3] * 5, SamplingParams(0.0, frequency_penalty=2.0, max_tokens=30)),
        Request([1, 2, 3] * 5, SamplingParams(0.0, max_tokens=30)),
        Request([1, 2, 3] * 5, SamplingParams(0.0, max_tokens=30), tools=(Calculator(),)),
    ]
    ours, theirs = make(JULY).generate(asked), plain(JULY).generate(asked)
    assert [one.tokens for (one,) in ours] == [one.tokens for (one,) in theirs]


def test_a_draft_model_lies_on_the_mesh_of_the_model() -> None:
    config = small.october2025(depth=1)
    mesh = make_mesh(Mesh(data=2, tensor=2), rows=2, devices=jax.devices()[:4])
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    sharded = make(config, slots=2, draft=(Transformer(config), params), mesh=mesh)
    assert sharded.slots._draft_params is not None
    head = sharded.slots._draft_params["ends"]["head"]
    assert head.sharding.shard_shape(head.shape) == (16, 32), "the vocabulary, split in two"
    asked = requests()[4:7]
    expected = make(config, None, slots=2).generate(asked)
    assert [one.tokens for (one,) in sharded.generate(asked)] == [one.tokens for (one,) in expected]
    cache = sharded.slots._draft_cache
    assert cache is not None
    assert cache.layers[0].k_BKSD.sharding.shard_shape(cache.layers[0].k_BKSD.shape)[:2] == (1, 2)


def test_drawn_tokens_have_the_targets_distribution() -> None:
    config = small.october2025(vocab=5, depth=1)
    draft = drafts(config)["stranger"]
    engine = make(config, dataclasses.replace(ALWAYS, tokens=2), slots=100, draft=draft)
    counted = np.zeros((5, 5))
    count = 4000
    answers = engine.generate([Request([1, 2, 3], SamplingParams(1.0, max_tokens=3, ignore_end=True), n=count)])[0]
    for answer in answers:
        counted[answer.tokens[0], answer.tokens[1]] += 1
    model, params = Transformer(config), small.parameters(config)
    ids = np.array([[1, 2, 3, first] for first in range(5)], np.int32)
    logits = np.asarray(jax.jit(lambda p: model.logits(p, model.apply(p, ids)[0]))(params), np.float64)
    p_TV = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p_TV /= p_TV.sum(axis=-1, keepdims=True)
    expected = count * p_TV[0, 2][:, None] * p_TV[:, 3]
    many = expected > 5
    chi_square = np.sum((counted - expected)[many] ** 2 / expected[many])
    assert chi_square < many.sum() + 5 * np.sqrt(2 * many.sum())


def test_lookup_continues_the_latest_earlier_occurrence() -> None:
    text_BL = np.zeros((4, 16), np.int32)
    text_BL[0, :9] = [7, 1, 2, 8, 1, 2, 9, 1, 2]
    text_BL[1, :9] = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    text_BL[2, :9] = [9, 9, 4, 5, 6, 4, 5, 6, 4]
    text_BL[3, :2] = [1, 1]
    found = jax.jit(lookup, static_argnames=("ngram", "tokens"))
    got = found(text_BL, np.array([8, 8, 8, 0], np.int32), ngram=2, tokens=5)
    np.testing.assert_array_equal(got[:2], [[9, 1, 2, 9, 1], [-1] * 5])
    np.testing.assert_array_equal(got[2], [5, 6, 4, 5, 6])
    np.testing.assert_array_equal(got[3], [-1] * 5)
    for row, size in ((0, 9), (1, 9), (2, 9), (3, 1)):
        assert repeats(text_BL[row, :size], 2) == (got[row, 0] >= 0)


def test_guessing_rests_longer_and_longer_while_it_fails() -> None:
    luck, tried = AcceptanceTracker(least=1.0), []
    for i in range(200):
        if luck.wants():
            tried.append(i)
            luck.note(0.0)
    gaps = np.diff(tried)
    assert list(gaps[:4]) == [5, 9, 17, 33]
    assert gaps.max() <= 65
    lucky = AcceptanceTracker(least=1.0)
    for _ in range(20):
        assert lucky.wants()
        lucky.note(3.0)


def test_a_draft_model_of_another_vocabulary_is_refused() -> None:
    config = small.october2025()
    other = small.october2025(vocab=40)
    draft = Transformer(other), jax.tree.map(jnp.asarray, small.parameters(other))
    with pytest.raises(UserError, match="vocabulary"):
        make(config, draft=draft)


def test_a_mixer_whose_cache_cannot_be_rolled_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupedQueryAttention, "rewinds", staticmethod(lambda config: False))
    with pytest.raises(UserError, match="which GQA has not"):
        make(small.october2025())


def test_a_checkpoint_drafts_for_another_with_the_same_tokenizer(tmp_path: Path) -> None:
    large = exports.write_run(tmp_path / "large", exports.model(depth=2))
    small_one = exports.write_run(tmp_path / "small", exports.model(depth=1), scale=0.4)
    request = Request([1, 5, 9], SamplingParams(0.8, max_tokens=12, seed=3))
    plain = load_engine(large, adapt=False).generate([request])[0][0]
    drafted = load_engine(large, draft=small_one).generate([request])[0][0]
    assert drafted.tokens == plain.tokens and len(plain.tokens) > 1
    other = Path(small_one).parent / "tokenizer"
    shutil.rmtree(other)
    exports.tokenizer("unigram").save(other)
    with pytest.raises(UserError, match="has another tokenizer than"):
        load_engine(large, draft=small_one)


def test_a_draft_knows_all_of_a_prompt_whose_prefix_was_reused() -> None:
    """Also where prompts of other lengths, reused in part, take the same chunks of prefill."""
    text = np.random.default_rng(3).integers(1, 60, 120).tolist()
    asked = SamplingParams(0.0, max_tokens=60, ignore_end=True)
    for draft in ("itself", "stranger"):
        engine = make(JULY, draft=drafts(JULY)[draft])
        engine.generate([Request(text[:60], SamplingParams(0.0, max_tokens=1), store=True)])
        requests = [Request(text[:40], asked), Request(text[:99], asked), Request(text[1:41], asked)]
        assert [one.tokens for (one,) in engine.generate(requests)] == [
            one.tokens for (one,) in plain(JULY).generate(requests)
        ]
        assert engine.prompt_stats.reused == 60
    one = make(JULY, slots=1, draft=drafts(JULY)["itself"])
    one.generate([Request(text[:60], SamplingParams(0.0, max_tokens=1), store=True)])
    counts = small.dispatches(one)
    one.generate([Request(text[:99], asked)])
    assert counts["dispatches"] == np.ceil(59 / (ALWAYS.tokens + 1) / ALWAYS.rounds), "every guess is accepted"
