"""Slots in use, and those that wait."""

import jax
import jax.numpy as jnp
import numpy as np
import small
from letters import Letters

from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.model import Transformer


def test_few_slot_steps_are_wasted() -> None:
    """Idle slots count, to the last answer's end."""
    config = small.october2025(depth=1)
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    engine = Engine(Transformer(config), params, Letters(), EngineConfig(length=600, slots=8, steps=8))  # type: ignore[arg-type]
    counts = small.dispatches(engine)
    lengths = np.random.default_rng(0).integers(1, 513, 64)
    asked = [SamplingParams(0.0, max_tokens=int(count), ignore_end=True) for count in lengths]
    engine.generate([Request([0, 1 + i % 50, *range(1, 8)], params) for i, params in enumerate(asked)])
    assert counts["useful steps"] == lengths.sum() - 64  # the first of each comes with its prompt
    assert counts["useful steps"] / counts["slot steps"] >= 0.9
