"""Requests of an engine: refused, cancelled, streamed, read in chunks between the chunks of others."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
import small
from test_engine import GREEDY, LENGTH, SHAPE, ask, assert_most_likely, july2026, make, prompt

from jaxchat.decode import programs
from jaxchat.decode.engine import Engine
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.evaluation.likelihoods import Scorer


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine that reads prompts in pieces of 32 and has room for 4 samples; each test leaves it idle."""
    yield make(july2026())


BAD: dict[str, tuple[Any, str]] = {
    "empty": (lambda: Request([]), "prompt is empty"),
    "long": (
        lambda: Request([1] * LENGTH),
        "320 tokens, but the context has 320, 1 of them for the answer: shorten it",
    ),
    "strange": (lambda: Request([1, 60]), "contains token id 60"),
    "biased": (lambda: Request([1], SamplingParams(logit_bias={99: 1.0})), "logit_bias contains token id 99"),
    "stops": (lambda: Request([1], SamplingParams(stop_tokens=(-1,))), "stop_tokens contains token id -1"),
    "none": (lambda: Request([1], n=0), "n=0"),
    "half": (lambda: Request([1], n=1.5), "n=1.5"),  # type: ignore[arg-type]
    "text": (lambda: Request("12"), "must be a list of token ids"),  # type: ignore[arg-type]
    "between": (lambda: Request([1.5]), "must be a list of token ids"),  # type: ignore[list-item]
    "nothing": (lambda: Request(None), "must be a list of token ids"),  # type: ignore[arg-type]
    "support": (
        lambda: Request([1], SamplingParams(top_k=3, presence_penalty=1.0), return_support=True),
        "return_support",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_request_gets_its_error_and_harms_no_other(engine: Engine, bad: str) -> None:
    request, sentence = BAD[bad][0](), BAD[bad][1]
    with pytest.raises(UserError, match=sentence):
        engine.submit(request)
    good = Request(prompt(12), GREEDY)
    (first,), (refusal,), (last,) = engine.generate([good, request, good])
    assert refusal.finish_reason == "error"
    assert sentence in str(refusal.error)
    assert first.tokens == last.tokens == ask(engine, prompt(12)).tokens


def test_a_request_is_cancelled_before_during_and_after_its_run(engine: Engine) -> None:
    long = dataclasses.replace(GREEDY, max_tokens=60, ignore_end=True)
    right = ask(engine, prompt(8), long)
    samples = [sample for size in (8, 20, 21, 22, 23, 24) for sample in engine.submit(Request(prompt(size), long))]
    samples[5].cancel()
    engine.step()
    samples[2].cancel()
    while engine.step():
        pass
    samples[0].cancel()
    answers = [sample.completion() for sample in samples]
    reasons = [answer.finish_reason for answer in answers]
    assert reasons == ["length", "length", "cancelled", "length", "length", "cancelled"]
    assert answers[0].tokens == right.tokens
    assert 0 < len(answers[2].tokens) < 60
    assert answers[5].tokens == ()
    assert ask(engine, prompt(21), long).tokens[: len(answers[2].tokens)] == answers[2].tokens


def test_a_stream_is_the_answers_text_and_can_be_closed(engine: Engine) -> None:
    stream = lambda: engine.follow(*engine.submit(Request(prompt(17), GREEDY)))  # noqa: E731
    pieces = list(stream())
    assert len(pieces) > 1
    assert "".join(pieces) == ask(engine, prompt(17)).text
    one, other = engine.submit(Request(prompt(17), GREEDY, n=2))
    followed = ["".join(engine.follow(sample)) for sample in (one, other)]
    assert followed == ["".join(pieces)] * 2, "the second had ended before it was followed"
    broken = stream()
    assert next(broken) == pieces[0]
    broken.close()
    assert not engine.step()


LONG = Request(prompt(200), GREEDY)  # Seven chunks.


def test_a_long_prompt_is_read_in_chunks_between_the_chunks_of_others(engine: Engine) -> None:
    busy = SamplingParams(temperature=0.9, max_tokens=90, seed=3, ignore_end=True)
    alone = [ask(engine, prompt(9), busy), ask(engine, LONG.prompt)]
    (short,) = engine.submit(Request(prompt(9), busy))
    engine.step()
    (long,), (last,) = engine.submit(LONG), engine.submit(Request(prompt(12), GREEDY))
    for chunk in range(6):
        before = len(short.tokens)
        assert engine.step() and not long.tokens and not last.tokens, "requests enter in order"
        assert len(short.tokens) == before + SHAPE.steps, f"nobody waits for more than chunk {chunk}"
    engine.step()
    assert long.tokens and last.tokens and not short.finish_reason
    while engine.step():
        pass
    assert (tuple(short.tokens), tuple(long.tokens)) == tuple(answer.tokens for answer in alone)
    assert_most_likely(july2026(), LONG.prompt, long.completion())


def test_a_prompt_that_is_being_read_can_be_cancelled_and_reuses_a_prefix(engine: Engine) -> None:
    longer = (*LONG.prompt[:60], 7, *LONG.prompt[60:])
    expected = ask(engine, longer)
    ask(engine, longer[:50], store=True, params=SamplingParams(0.0, max_tokens=1))
    (short,) = engine.submit(Request(prompt(9), dataclasses.replace(GREEDY, max_tokens=150, ignore_end=True)))
    engine.step()
    (gone,), (kept,) = engine.submit(LONG), engine.submit(Request(longer, GREEDY))
    before = engine.prompt_stats.reused
    engine.step()
    gone.cancel()
    while engine.step():
        pass
    assert (gone.finish_reason, gone.tokens) == ("cancelled", [])
    assert engine.prompt_stats.reused == before + 2 * 50 and tuple(kept.tokens) == expected.tokens
    assert len(short.tokens) == 150
    engine.prefixes.clear()


def test_a_batch_of_prompts_is_read_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody follows the text, slots that stay empty meanwhile would only cost time."""
    order: list[str] = []
    for name in ("prefill", "decode"):
        real = getattr(programs, name)
        note = lambda *args, real=real, name=name, **kwargs: order.append(name) or real(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(programs, name, note)
    engine.generate([LONG] * 4)
    assert order[: 4 * 7 + 1] == ["prefill"] * 28 + ["decode"]


@pytest.mark.parametrize("moment", ["seat", "prefill", "first", "decode", "empty"])
def test_an_error_in_a_step_ends_its_requests_and_not_the_engine(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are donated to the call that fails."""
    engine = make(small.october2025(depth=1))
    ask(engine, prompt(20), store=True)
    right = [ask(engine, tokens).tokens for tokens in (prompt(9), (*prompt(20), 5), prompt(70))]
    (active,) = engine.submit(Request(prompt(9), dataclasses.replace(GREEDY, max_tokens=99, ignore_end=True)))
    if moment != "empty":
        engine.step()
    for asked in (Request((*prompt(20), 5), GREEDY), Request(prompt(70), GREEDY, n=3)):
        engine.submit(asked)
    samples, real = list(engine._unfinished), getattr(programs, moment)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt if moment == "first" else jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much")

    monkeypatch.setattr(programs, moment, fails)
    with pytest.raises((KeyboardInterrupt, jax.errors.JaxRuntimeError)):
        while engine.step():
            pass
    assert len(samples) == 5 and {sample.finish_reason for sample in samples} == {"error"}
    assert active.error is not None and active.error.startswith("the engine stopped: ")
    with pytest.raises(UserError, match="the engine stopped"):
        list(engine.follow(samples[-1]))
    monkeypatch.setattr(programs, moment, real)
    assert not engine.step()
    assert [ask(engine, tokens).tokens for tokens in (prompt(9), (*prompt(20), 5), prompt(70))] == right


def test_an_engine_without_parameters_holds_no_memory(engine: Engine) -> None:
    before = ask(engine, prompt(40), store=True)
    params = jax.tree.map(jnp.asarray, small.parameters(july2026()))
    own = make(july2026())
    own.load(params)
    ask(own, prompt(40), store=True)
    own.unload()
    assert not jax.tree.leaves((own.params, own.slots._cache, own.slots._history, own.slots._rows))
    assert len(own.prefixes) == 0
    assert Scorer(engine.transformer, engine.params, length=64).params is engine.params, "shared and not copied"
    own.load(engine.params)
    assert ask(own, prompt(40)).tokens == before.tokens and own.params is engine.params
