"""Generation: greedy text beside the full forward, ends, limits, and no program compiled twice."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxchat.config import UserError
from jaxchat.decode import engine
from jaxchat.decode.engine import Engine
from jaxchat.decode.sampling import SamplingParams
from jaxchat.model import Transformer

LENGTH, GREEDY = 64, SamplingParams(temperature=0.0, max_tokens=40)
PROMPT = "one day a fox"


class Letters:
    """A tokenizer of one id a letter; id 0 begins a text."""

    bos = 0

    def __init__(self, **specials: int) -> None:
        self.specials = {f"<|{name}|>": number for name, number in specials.items()}

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 59 + 1 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("0") + number) for number in ids)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(small.july2026(layer_loop="scan"))


@pytest.fixture(scope="module")
def params(model: Transformer) -> Any:
    return jax.tree.map(jnp.asarray, small.parameters(model.config))


@pytest.fixture(scope="module")
def machine(model: Transformer, params: Any) -> Iterator[Engine]:
    """An engine that reads prompts in pieces of 8, so that a prompt takes several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PIECE", 8)
        yield Engine(model, params, Letters(), length=LENGTH)  # type: ignore[arg-type]


def test_greedy_text_is_the_full_forwards_most_likely(model: Transformer, params: Any, machine: Engine) -> None:
    answer = machine.complete(PROMPT, GREEDY)
    assert (len(answer.tokens), answer.finish_reason) == (40, "length")
    assert len(set(answer.tokens)) > 3
    prompt = [0, *Letters().encode(PROMPT)]
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, : len(prompt) + 40] = [*prompt, *answer.tokens]
    logits_BTV = jax.jit(lambda p: model.logits(p, model.apply(p, ids)[0]))(params)
    best_T = np.asarray(logits_BTV[0].argmax(axis=-1))
    np.testing.assert_array_equal(answer.tokens, best_T[len(prompt) - 1 :][:40])
    assert answer.text == Letters().decode(list(answer.tokens))


def test_a_seed_gives_its_text_again_and_other_seeds_others(machine: Engine) -> None:
    def tokens(seed: int) -> tuple[int, ...]:
        return machine.complete(PROMPT, SamplingParams(temperature=1.0, top_k=3, max_tokens=8, seed=seed)).tokens

    texts = [tokens(seed) for seed in range(8)]
    assert texts[3] == tokens(3)
    firsts = {text[0] for text in texts}
    assert 1 < len(firsts) < len(texts), "the first token's noise does not depend on the seed, or no two agree"
    assert len(set(texts)) == len(texts)


def test_other_sampling_parameters_compile_nothing(machine: Engine) -> None:
    machine.complete(PROMPT, GREEDY)
    compiled: list[str] = []

    def note(event: str, seconds: float, **about: Any) -> None:
        if "compile" in event or "trace" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        machine.complete(PROMPT[::-1], SamplingParams(temperature=0.7, top_k=5, top_p=0.9, max_tokens=33, seed=12))
        machine.complete(PROMPT[1:] + "y", SamplingParams(temperature=1, top_p=1, max_tokens=2, seed=9))
        assert not compiled
        jax.jit(lambda x: x + 1)(0)
        assert compiled, "the listener hears nothing"
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_an_end_token_ends_the_text(machine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = machine.complete(PROMPT, GREEDY).tokens
    end = next(token for i, token in enumerate(tokens) if i > 4 and token not in tokens[:i])
    monkeypatch.setattr(machine, "_stops", {end})
    answer = machine.complete(PROMPT, GREEDY)
    assert (answer.tokens, answer.finish_reason) == (tokens[: tokens.index(end)], "stop")
    assert answer.text == Letters().decode(list(answer.tokens))


def test_end_tokens_are_the_tokenizers(model: Transformer, params: Any) -> None:
    specials = Letters(bos=0, assistant_end=7, user_start=8)
    assert Engine(model, params, specials, length=LENGTH)._stops == {0, 7}  # type: ignore[arg-type]


def test_a_full_context_ends_the_text(machine: Engine) -> None:
    answer = machine.complete(PROMPT, SamplingParams(temperature=0.0, max_tokens=500))
    assert (len(answer.tokens), answer.finish_reason) == (LENGTH - 1 - len(PROMPT), "context")
    assert answer.tokens[:40] == machine.complete(PROMPT, GREEDY).tokens


def test_a_prompt_longer_than_the_context_is_refused(machine: Engine) -> None:
    with pytest.raises(UserError, match=r"64 tokens and the context 64"):
        machine.complete("x" * 63, GREEDY)
    assert len(machine.complete("x" * 62, GREEDY).tokens) == 1
