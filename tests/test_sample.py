"""Answers that are cancelled: at any moment, and to the harm of no other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from letters import Letters

from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.decode.speculative import Speculation
from jaxchat.model import Transformer

KINDS = (
    SamplingParams(0.0, max_tokens=30, ignore_end=True),
    SamplingParams(1.0, max_tokens=21, seed=3, ignore_end=True),
    SamplingParams(0.8, top_k=9, frequency_penalty=1.0, max_tokens=13, seed=4),
)


def make(**about: Any) -> Engine:
    config = small.july2026(depth=2)
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    shape = EngineConfig(length=96, slots=3, steps=4, prefill_chunk=16, prefill_batch=2, adapt=False)
    return Engine(Transformer(config), params, Letters(), shape, **about)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "speculation", [None, Speculation(tokens=3, ngram=1, rounds=2, least=0.0)], ids=["", "guesses"]
)
def test_a_cancelled_sample_harms_no_other_whenever_it_is(speculation: Speculation | None) -> None:
    """Waiting, read and without a slot, in a slot, ended; some of them one of several samples of a prompt."""
    engine = make(speculation=speculation)
    requests = [Request([1 + i, *range(2, 4 + 5 * i)], KINDS[i % 3], n=1 + i % 3, store=i % 2 == 0) for i in range(7)]
    whole = [[answer.tokens for answer in answers] for answers in make().generate(requests)]
    seen = set()
    for seed in range(4):
        generator = np.random.default_rng(seed)
        samples = [engine.submit(request) for request in requests]
        pairs = [pair for group, texts in zip(samples, whole) for pair in zip(group, texts)]
        going = True
        while going:
            if generator.random() < 0.5:
                sample, _ = pairs[generator.integers(len(pairs))]
                before, reason = len(sample.tokens), sample.finish_reason
                sample.cancel()
                assert sample.finish_reason == (reason or "cancelled")
                seen.add((before > 0, reason))
            going = engine.step()
        for sample, text in pairs:
            cancelled = sample.finish_reason == "cancelled"
            assert tuple(sample.tokens) == text[: len(sample.tokens) if cancelled else None]
            assert sample.completion().finish_reason in ("cancelled", "length", "stop")
        assert engine.slots.free == 3
    assert seen >= {(False, ""), (True, ""), (True, "length"), (False, "cancelled")}
