"""The microscope shows the numbers of the model itself: of its forward pass, its engine and launch.chat."""

import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from documents import texts
from parts import EXAMPLES

from jaxchat.decode import explain
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.inspection import tables, text, tokens
from jaxchat.model import Transformer
from jaxchat.model.dense import visible, weights
from jaxchat.model.trace import lens, trace
from jaxchat.tokenizer import TokenizerConfig, train_tokenizer

MODELS = {"july2026": small.july2026(layer_loop="scan"), "october2025": small.october2025(), "mixed": small.mixed()}
MODELS |= {name: EXAMPLES[name].model for name in ("gemma", "after")}  # Scores with a softcap, sinks and a bias.


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_trace_is_the_forward_pass(config: Any) -> None:
    transformer, params = Transformer(config), small.parameters(config)
    tokens_BT = small.batch(2, 12, config.vocab)["tokens"]

    @jax.jit
    def both(params: Any) -> Any:
        traced = trace(transformer, params, tokens_BT)
        said = [lens(transformer, params, traced, layers) for layers in (0, config.depth)]
        return traced, said, transformer.logits(params, transformer.apply(params, tokens_BT).hidden)

    traced, (first, last), logits_BTV = both(params)
    np.testing.assert_allclose(last, logits_BTV, atol=1e-5, rtol=1e-5)
    assert np.abs(first - last).max() > 0.1
    assert len(traced.streams) == config.depth + 1 and len(traced.attended) == config.depth
    position_BT = jnp.broadcast_to(jnp.arange(12), (2, 12))
    for layer, attended in zip(config.layers, traced.attended):
        mixer = layer.mixer
        seen_BTS = visible(position_BT, position_BT, window=mixer.window)
        changed = attended.bias_BHTT, attended.softcap, attended.sinks_H
        assert (changed[1] is not None, changed[2] is not None) == (mixer.softcap is not None, mixer.sinks)
        w_BHTS = weights(attended.q_BTHD, attended.k_BTKD, seen_BTS, *changed)
        sums_BHT = w_BHTS.sum(axis=-1)
        assert np.all(sums_BHT < 0.999) if mixer.sinks else np.allclose(sums_BHT, 1, atol=1e-6)
        assert not w_BHTS[:, :, ~seen_BTS[0]].any()
        v_BTHD = np.repeat(attended.v_BTKD, mixer.heads // mixer.kv_heads, axis=2)
        np.testing.assert_allclose(np.einsum("BHTS,BSHD->BTHD", w_BHTS, v_BTHD), attended.o_BTHD, atol=1e-5, rtol=1e-5)


TEXT = "the fox saw 17 birds \u2581 na\u00efve \uc548\ub155 \U0001f642  $x$\nend "


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A random model with the tokenizer of a few texts."""
    tokenizer = train_tokenizer(texts(200), vocab=400, config=TokenizerConfig())
    config = small.july2026(vocab=400)
    return Engine(Transformer(config), small.parameters(config), tokenizer, EngineConfig(length=128, slots=1))


@pytest.fixture(scope="module")
def ids(engine: Engine) -> list[int]:
    return [engine.tokenizer.bos, *engine.tokenizer.encode("the fox saw small birds")]


def test_attention_lens_and_losses_are_those_of_the_engine(engine: Engine, ids: list[int]) -> None:
    view, logits_TV = text.look(engine, ids), engine.forward(ids)
    np.testing.assert_allclose(view.trace.forward.hidden[0, : len(ids)].shape, (len(ids), 16))
    for layer in range(4):
        for head in range(4):
            rows = text.attention(view, layer, head)
            assert [len(row) for row in rows] == list(range(1, len(ids) + 1))
            assert [sum(row) for row in rows] == pytest.approx([1] * len(ids), abs=1e-4)
            attended = view.trace.attended[layer]
            values = np.asarray(attended.v_BTKD)[0, :, head * attended.v_BTKD.shape[2] // 4]
            mixed = [np.asarray(row) @ values[: len(row)] for row in rows]
            np.testing.assert_allclose(mixed, np.asarray(attended.o_BTHD)[0, : len(ids), head], atol=1e-4)
    assert not any(text.attention(view, 0, 0)[-1][:-4]), "a window of 3 sees 4 keys"
    *_, last = text.lens(view)
    losses = text.losses(engine, ids)
    assert [said["candidates"][0]["token"] for said in last] == logits_TV.argmax(axis=1).tolist()
    assert [said["next"] for said in last[:-1]] == pytest.approx([math.exp(-one["loss"]) for one in losses], rel=1e-4)
    assert [one["loss"] for one in losses] == [-one.logprob for one in explain.score(engine, ids)]
    assert last[-1]["next"] is None and len(text.lens(view)) == 5


def test_candidates_are_those_of_explain_and_one_step_ahead(engine: Engine, ids: list[int]) -> None:
    params = SamplingParams(0.7, top_k=5, top_p=0.8, repetition_penalty=1.2)
    found = text.candidates(engine, ids[:3], ids[3:], params, count=4)
    expected = explain.explain(engine, ids[:3], ids[3:], params, count=4)
    assert len(found) == len(expected) + 1
    for step, wanted in zip(found, expected):
        assert [(one["token"], one["chosen"]) for one in step] == [(one.token, one.chosen) for one in wanted]
        for one, other in zip(step, wanted):
            assert one["probabilities"] == pytest.approx(other.probabilities, abs=1e-6)
    assert found[-1][0]["token"] == engine.forward(ids)[-1].argmax() and not any(one["chosen"] for one in found[-1])
    json.dumps(found, allow_nan=False)


def test_what_is_not_there_is_refused_in_a_sentence(engine: Engine, ids: list[int]) -> None:
    view = text.look(engine, ids)
    for layer, head, sentence in ((4, 0, "there is no layer 4"), (-1, 0, "no layer -1"), (0, 4, "there is no head 4")):
        with pytest.raises(UserError, match=sentence):
            text.attention(view, layer, head)
    with pytest.raises(UserError, match="there is no token 400"):
        tables.neighbours(engine, 400)
    with pytest.raises(UserError, match="the text is empty"):
        text.look(engine, [])


def test_tokens_tell_bytes_and_the_characters_that_end_in_them(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    shown = tokens.tokens(tokenizer, [tokenizer.bos, *tokenizer.encode(TEXT)])
    assert shown[0] | {"text": "<|bos|>", "special": True} == shown[0]
    assert bytes(byte for one in shown[1:] for byte in one["bytes"]).decode() == TEXT
    assert "".join(one["text"] for one in shown[1:]) == TEXT
    smile = next(i for i, one in enumerate(shown) if one["text"] == "\U0001f642")
    assert [one["text"] for one in shown[smile - 3 : smile]] == [""] * 3
    cut = tokens.tokens(tokenizer, [*tokenizer.encode("\uc548")[:-1], tokenizer.bos])
    assert [one["text"] for one in cut[-2:]] == ["\ufffd", "<|bos|>"]


MIXED = ["".join(np.random.default_rng(seed).choice(list("thefoxsawbernldquiysmg"), 14)) for seed in range(20)]


@pytest.mark.parametrize("said", [TEXT, *texts(5), *MIXED, "", "  two  spaces ", "\u2581\u2581", "aaaaaaa 111"])
def test_the_replayed_merges_end_in_the_tokens_of_the_text(engine: Engine, said: str) -> None:
    tokenizer = engine.tokenizer
    replayed = tokens.merges(tokenizer, said)
    assert "".join(part["text"] for part in replayed) == said
    assert [i for part in replayed for i in part["ids"]] == tokenizer.encode(said)
    for part in replayed:
        pieces = [[piece.replace("\u2581", " ") for piece in step["pieces"]] for step in part["steps"]]
        assert all("".join(step) == part["text"].replace("\u2581", " ") for step in pieces)
        assert all(len(after) == len(before) - 1 for before, after in itertools.pairwise(pieces))
        longer = [repr(piece) for piece in pieces[-1] if len(piece) > 1]
        assert longer == [name for name in part["names"] if len(name) > 3 and name[0] in "'\"" and name != repr("\n")]


def test_a_unigram_tokenizer_has_no_merges() -> None:
    tokenizer = train_tokenizer(texts(200), vocab=300, config=TokenizerConfig(algorithm="unigram"))
    with pytest.raises(UserError, match="has no merges"):
        tokens.merges(tokenizer, "the fox")


def test_neighbours_and_the_map_are_distances_in_the_embedding(engine: Engine) -> None:
    table_VM = np.asarray(engine.params["ends"]["embed"])[:400].astype(np.float64)
    unit_VM = table_VM / np.linalg.norm(table_VM, axis=1, keepdims=True)
    near = tables.neighbours(engine, 300, count=5)
    assert [one["token"] for one in near] == np.argsort(-(unit_VM @ unit_VM[300]))[1:6].tolist()
    assert near[0]["cosine"] == pytest.approx(unit_VM[near[0]["token"]] @ unit_VM[300], abs=1e-5)
    whole, some = tables.embedding_map(engine), tables.embedding_map(engine, [5, 7])
    assert some["points"] == [whole["points"][5], whole["points"][7]] and len(whole["points"]) == 400
    singular_M = np.linalg.svd(table_VM - table_VM.mean(axis=0), compute_uv=False)
    spread = [math.sqrt(sum(one[axis] ** 2 for one in whole["points"])) for axis in "xy"]
    assert spread == pytest.approx(singular_M[:2], rel=1e-6)
    assert whole["variance"] == pytest.approx(singular_M[:2] ** 2 / (singular_M**2).sum(), rel=1e-6)


def test_the_cache_grows_as_the_engines_does(engine: Engine) -> None:
    found = tables.cache_bytes(engine.transformer, 24)
    assert found["lengths"] == [1, 2, 4, 8, 16, 24]
    for length, size in zip(found["lengths"], found["bytes"]):
        cache = engine.transformer.empty_cache(1, length, write=1)
        assert size == sum(x.nbytes for x in jax.tree.leaves(cache.layers))
    assert [layer["window"] for layer in found["layers"]] == [3, None, 3, None]
    assert found["layers"][0]["bytes"][-1] == found["layers"][0]["bytes"][3] < found["layers"][1]["bytes"][-1]
