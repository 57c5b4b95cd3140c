"""Beam search beside every text there is, and beside transformers."""

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from letters import Letters
from outside import GOLDEN, read

from jaxchat.decode.beam import beam_search, search
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.export import families
from jaxchat.export.places import to_params
from jaxchat.model import Transformer

VOCAB, LENGTH = 5, 5


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A vocabulary of five words, of which the first and the last end a text."""
    config = small.october2025(vocab=VOCAB)
    params = jax.tree.map(jnp.asarray, small.parameters(config, scale=0.5))
    return Engine(Transformer(config), params, Letters(assistant_end=4), EngineConfig(length=16))  # type: ignore[arg-type]


def every_text(engine: Engine, prompt: list[int], penalty: float, length: int = LENGTH) -> dict[tuple[int, ...], float]:
    """The score of every text that ends at an end token or at the limit."""
    whole = np.array(list(itertools.product(range(VOCAB), repeat=length)), np.int32)
    ids = np.concatenate([np.tile(prompt, (len(whole), 1)), whole], axis=1).astype(np.int32)
    model = engine.transformer
    forward = jax.jit(lambda p: jax.nn.log_softmax(model.logits(p, model.apply(p, ids)[0])))
    logprobs_BTV = np.asarray(forward(engine.params), np.float64)[:, len(prompt) - 1 : -1]
    each_BT = np.take_along_axis(logprobs_BTV, whole[:, :, None], axis=2)[..., 0]
    scores = {}
    for text, logprobs in zip(whole.tolist(), each_BT):
        size = next((i + 1 for i, token in enumerate(text) if token in engine.ends), length)
        scores[tuple(text[:size])] = logprobs[:size].sum() / size**penalty
    return scores


@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
def test_enough_beams_find_the_best_of_all_texts(engine: Engine, penalty: float) -> None:
    prompt = [1, 2, 3]
    asked: Any = {"beams": 4**4, "max_tokens": LENGTH, "length_penalty": penalty, "early_stopping": "never"}
    found = beam_search(engine, prompt, **asked)
    scores = every_text(engine, prompt, penalty)
    assert [beam.score for beam in found] == pytest.approx([scores[beam.tokens] for beam in found], rel=1e-5)
    assert len({beam.tokens for beam in found}) == len(found)
    best = sorted(scores.items(), key=lambda item: -item[1])[:20]
    for beam, (tokens, score) in zip(found, best):
        assert beam.score == pytest.approx(score, abs=1e-5)
        assert scores[beam.tokens] == pytest.approx(score, abs=1e-5)
        assert tokens == beam.tokens or scores[tokens] == pytest.approx(score, abs=1e-5)


def test_more_beams_than_there_are_texts_find_each_of_them_once(engine: Engine) -> None:
    scores = every_text(engine, [1, 2], 1.0, length=3)
    found = beam_search(engine, [1, 2], beams=100, max_tokens=3, early_stopping="never")
    assert sorted(beam.tokens for beam in found) == sorted(scores)
    assert [beam.score for beam in found] == pytest.approx([scores[beam.tokens] for beam in found], rel=1e-5)


def test_one_beam_is_greedy(engine: Engine) -> None:
    (beam,) = beam_search(engine, [1, 2], beams=1, max_tokens=9)
    answer = engine.generate([Request([1, 2], SamplingParams(0.0, max_tokens=9))])[0][0]
    assert beam.tokens == answer.tokens


PLACES = families.FAMILIES["nanochat"].places


@pytest.fixture(scope="module")
def transformers_engine() -> Engine:
    golden = read("nanochat_v1_gqa")
    config, _ = families.read_config(golden.config)
    params = jax.tree.map(jnp.asarray, to_params(config, golden.weights, PLACES))
    return Engine(Transformer(config), params, Letters(), EngineConfig(length=32))  # type: ignore[arg-type]


GOLDEN_BEAMS = json.loads((GOLDEN / "beams.json").read_text())


@pytest.mark.parametrize("search", GOLDEN_BEAMS["searches"], ids=lambda search: str(search["settings"]))
def test_texts_and_scores_are_those_of_transformers(
    transformers_engine: Engine, search: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = search["settings"]
    monkeypatch.setattr(transformers_engine, "ends", set())
    asked = dict(
        beams=settings["num_beams"],
        max_tokens=GOLDEN_BEAMS["about"]["new_tokens"],
        length_penalty=settings["length_penalty"],
        early_stopping=settings["early_stopping"],
        stop_tokens=tuple(settings["eos_token_id"]),
    )
    found = beam_search(transformers_engine, GOLDEN_BEAMS["about"]["prompt"], **asked)
    real = [score for score in search["scores"] if score > -1e8]
    assert [list(beam.tokens) for beam in found] == search["answers"][: len(real)]
    np.testing.assert_allclose([beam.score for beam in found], real, atol=1e-4)


def test_limits_penalties_and_stop_tokens_share_a_program(engine: Engine) -> None:
    beam_search(engine, [1, 2], beams=3, max_tokens=9)
    before = search._cache_size()
    for asked in ({"max_tokens": 1}, {"max_tokens": 50}, {"length_penalty": 0.5}, {"stop_tokens": [2, 3]}):
        beam_search(engine, [1, 2, 3], beams=3, **asked)  # type: ignore[arg-type]
    assert search._cache_size() == before


def test_what_cannot_be_searched_is_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="beams=0"):
        beam_search(engine, [1], beams=0)
    with pytest.raises(UserError, match="empty"):
        beam_search(engine, [])
    assert len(beam_search(engine, [1] * 15, beams=2, max_tokens=50)[0].tokens) == 1
