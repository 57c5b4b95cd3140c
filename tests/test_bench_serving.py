"""The benchmark of the server: its measure of ties, and all of it with few requests."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from exports import model, write_run

from benchmarks import serving
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.loading import load_engine
from launch import bench


def test_a_gap_is_that_of_the_token_that_was_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is positive at every token of an answer, and almost none where the two best logits are made equal."""
    engine = load_engine(write_run(tmp_path, model(head_std=0.1), length=128, scale=0.4), slots=1, adapt=False)
    prompt = [60, 70, 80]
    params = SamplingParams(1.0, max_tokens=serving.ANSWER, seed=5)
    ((answer,),) = engine.generate([Request(prompt, params)])
    gaps = [serving.gap(engine, prompt, 5, place) for place in range(serving.ANSWER)]
    assert min(gaps) > 0

    def tied(rows: Any, position_B: Any, size: int) -> Any:
        logits_V = engine.forward(prompt)[-1]
        second = np.argsort(-logits_V)[1]
        first = answer.tokens[0]
        uniform_V = np.full(size, 1e-9, np.float32)
        for token in (first, second if second != first else np.argmax(logits_V)):
            uniform_V[token] = np.exp(-np.exp(logits_V[token] - 9))  # Noise that makes 9 of the sum.
        return jnp.array(uniform_V)[None]

    monkeypatch.setattr(serving, "noise", tied)
    assert abs(serving.gap(engine, prompt, 5, 0)) < 1e-4 < gaps[0]


@pytest.mark.nightly
def test_the_server_under_little_load(tmp_path: Path) -> None:
    run = write_run(tmp_path, model(head_std=0.1), length=128, scale=0.4)
    found: Any = bench.main(["serve", f"--checkpoint={run}", "--quick"])
    assert found["seeded"] == {"count": 8, "different": 0, "largest_gap": 0}
    assert found["seeded_with_adapt"]["largest_gap"] < 1e-3
    assert {"ratio", "first_token_seconds_p99", "health_seconds_p99"} <= set(found["streams_4"])
    assert found["leaving"]["requests"] == 80 and found["leaving"]["left"] > 0
    after = found["leaving"]["after_as_many_again"]
    assert after["jaxchat_waiting_answers"] == after["jaxchat_running_answers"] == 0
    assert after["threads"] <= found["leaving"]["after"]["threads"]
