"""The microscope shows the numbers of the model itself: of its forward pass, its engine and launch.chat."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxchat.model import Transformer
from jaxchat.model.dense import visible, weights

MODELS = {"july2026": small.july2026(layer_loop="scan"), "october2025": small.october2025(), "mixed": small.mixed()}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_trace_is_the_forward_pass(config: Any) -> None:
    transformer, params = Transformer(config), small.parameters(config)
    tokens_BT = small.batch(2, 12, config.vocab)["tokens"]

    @jax.jit
    def both(params: Any) -> Any:
        trace = transformer.trace(params, tokens_BT)
        lens = [transformer.lens(params, trace, layers) for layers in (0, config.depth)]
        return trace, lens, transformer.logits(params, transformer.apply(params, tokens_BT).hidden)

    trace, (first, last), logits_BTV = both(params)
    np.testing.assert_allclose(last, logits_BTV, atol=1e-5, rtol=1e-5)
    assert np.abs(first - last).max() > 0.1
    assert len(trace.streams) == config.depth + 1 and len(trace.attended) == config.depth
    position_BT = jnp.broadcast_to(jnp.arange(12), (2, 12))
    for layer, attended in zip(config.layers, trace.attended):
        mixer = layer.mixer
        seen_BTS = visible(position_BT, position_BT, window=mixer.window)
        w_BHTS = weights(attended.q_BTHD, attended.k_BTKD, seen_BTS)
        np.testing.assert_allclose(w_BHTS.sum(axis=-1), 1, atol=1e-6)
        assert not w_BHTS[:, :, ~seen_BTS[0]].any()
        v_BTHD = np.repeat(attended.v_BTKD, mixer.heads // mixer.kv_heads, axis=2)
        np.testing.assert_allclose(np.einsum("BHTS,BSHD->BTHD", w_BHTS, v_BTHD), attended.o_BTHD, atol=1e-5, rtol=1e-5)
