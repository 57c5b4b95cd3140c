"""The model: its layer loop, rematerialisation, keys, tail; test_parts.py has the relations of every part."""

import dataclasses
import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parts
import pytest
import small
from flax import linen as nn
from jax import Array

from jaxchat.errors import UserError
from jaxchat.model import (
    GELU,
    GQA,
    ALiBi,
    Layer,
    Learned,
    Linear,
    Llama3,
    Model,
    RoPE,
    T5Buckets,
    Transformer,
    YaRN,
)
from jaxchat.model.attention import MIXERS
from jaxchat.model.backends import choose_attention, choose_decoding
from jaxchat.model.mlp import MLPS
from jaxchat.model.part import Aux, Context, param
from jaxchat.objectives.likelihood import Likelihood

pytestmark = pytest.mark.quick

LENGTH = 16


def assert_cached_equals_full(config: Model) -> None:
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab, (2, LENGTH)).astype(np.int32)
    with jax.enable_x64(True):
        model, params = Transformer(config, jnp.float64), parts.parameters(config)
        logits_BTV = jax.jit(lambda p: model.logits(p, model.apply(p, tokens_BT)[0]))(params)
        parts.assert_cached_equals(config, params, tokens_BT, logits_BTV)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": ALiBi()}, "cannot add the bias of a position encoding to the scores"),
        ({"softcap": 50.0}, "cannot cap the scores (softcap=50.0)"),
        ({"sinks": True}, "cannot attend to sinks"),
        ({"dropout": 0.1}, "cannot drop attention weights"),
    ],
    ids=str,
)
def test_kernels_refuse_what_only_dense_products_can(changes: Any, reason: str) -> None:
    """By name with the reason; "auto" logs it and takes xla. Decoding drops nothing, so there dropout is no reason."""
    config = small.october2025(pattern=(GQA(heads=4, kv_heads=2, head_dim=8, **changes),))
    device, logged = SimpleNamespace(platform="tpu", device_kind="TPU v5e"), list[str]()
    options: Any = {"dtype": jnp.bfloat16, "device": device, "log": logged.append}
    assert choose_attention("auto", config, length=8, **options) == "xla"
    assert logged == [f"attention xla, not splash: splash {reason}"]
    with pytest.raises(UserError, match=re.escape(f"splash {reason}; set --attention=xla")):
        choose_attention("splash", config, length=8, **options)
    assert choose_decoding("auto", config, **options) == ("filled" if "dropout" in changes else "xla")


def test_a_row_longer_than_the_learned_positions_is_refused() -> None:
    config = small.october2025(pattern=(GQA(heads=4, kv_heads=2, head_dim=4, positions=Learned(8)),))
    transformer, params = Transformer(config), small.parameters(config)
    transformer.apply(params, np.zeros((1, 8), np.int32))
    with pytest.raises(ValueError, match="9 tokens are more than the 8 positions that the model learns"):
        transformer.apply(params, np.zeros((1, 9), np.int32))
    with pytest.raises(ValueError, match="9 tokens are more than the 8 positions that the model learns"):
        transformer.empty_cache(1, 9, write=1)


WRONG = {
    "share=0.3 of head_dim=10 channels is not a number of pairs": lambda: GQA(2, 2, 10, positions=RoPE(share=0.3)),
    "share=1.5 must be positive and at most 1": lambda: RoPE(share=1.5),
    "factor=0.0 must be positive and finite": lambda: Linear(0.0),
    "high=1.0 must be finite and more than low=1.0": lambda: Llama3(high=1.0),
    "fast=1.0 must be finite and more than slow=1.0": lambda: YaRN(2.0, 16, fast=1.0),
    "length=0 must be positive and finite": lambda: Learned(0),
    "buckets=9 must lie between 2 and longest=8": lambda: T5Buckets(9, 8),
    "dropout=1.0 must be at least 0 and below 1": lambda: GQA(2, 2, 8, dropout=1.0),
    "dropout=-0.1 must be at least 0 and below 1": lambda: Layer(GQA(2, 2, 8), GELU(8), dropout=-0.1),
    "scale=0.0 must be positive and finite, or None": lambda: GQA(2, 2, 8, scale=0.0),
    "softcap=-1.0 must be positive and finite, or None": lambda: GQA(2, 2, 8, softcap=-1.0),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_number_of_a_part_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG[message]()


def test_the_scale_of_the_embedding_is_rounded_to_the_compute_type() -> None:
    """As Gemma's: sqrt(width) in bfloat16 is another number, with which its models were trained."""
    config = small.october2025(embed_scale=15**0.5, embed_norm=False)
    params, tokens_11 = small.parameters(config), jnp.zeros((1, 1), jnp.int32)
    found = Transformer(config, jnp.bfloat16)._embed(params["ends"], Context(tokens_11, tokens_11, None), None)
    wanted = params["ends"]["embed"][0].astype(jnp.bfloat16) * np.asarray(15**0.5, jnp.bfloat16)
    np.testing.assert_array_equal(found[0, 0], wanted)
    assert float(np.asarray(15**0.5, jnp.bfloat16)) != 15**0.5


@functools.cache
def likelihood_and_gradient(config: Model) -> Any:
    """The whole likelihood and its gradients, in float64."""
    batch = small.batch(2, 12, config.vocab, np.float64)
    with jax.enable_x64(True):
        objective = functools.partial(Likelihood(), Transformer(config, jnp.float64))
        loss = jax.jit(jax.value_and_grad(lambda params: objective(params, batch).total))
        return jax.tree.map(np.asarray, loss(small.parameters(config, np.float64)))


@pytest.mark.parametrize(
    ("loop", "remat"),
    [("scan", "none"), ("scan", "full"), ("scan", "dots"), ("scan", "attention"), ("unroll", "full")],
)
def test_layer_loop_and_remat_change_nothing(loop: str, remat: str) -> None:
    plain = small.july2026()
    config = dataclasses.replace(plain, layer_loop=loop, remat=remat)
    small.assert_close(likelihood_and_gradient(config), likelihood_and_gradient(plain), 1e-12)


def test_remat_saves_less() -> None:
    """By policy, the bytes that the forward pass keeps for the backward pass; "attention" keeps what it names."""

    def kept(remat: str) -> int:
        config = small.july2026(remat=remat)
        params, batch = small.parameters(config), small.batch(2, 12, config.vocab)
        objective = functools.partial(Likelihood(), Transformer(config))
        _, pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: objective(p, batch).total, p), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    sizes = {remat: kept(remat) for remat in ("none", "full", "dots", "attention")}
    config = small.july2026()
    attention = config.depth * 2 * 12 * config.pattern[0].mixer.heads * config.pattern[0].mixer.head_dim
    assert sizes["attention"] == sizes["full"] + attention
    assert sizes["full"] < sizes["attention"] < sizes["dots"] < sizes["none"]


FIRST, SECOND = slice(0, 20), slice(20, 40)  # ids of the first and the second document


@functools.cache
def gradient_of_second_document(isolate: bool) -> Any:
    """The gradient, by parameter, of the second document's hidden states; its arguments are those."""
    model = Transformer(small.july2026(isolate_documents=isolate))
    segments_BT = jnp.asarray(np.repeat([[0, 1]], [7, 6], axis=1).astype(np.int32))
    probe_BTM = np.random.default_rng(3).standard_normal((1, 13, 16)).astype(np.float32)

    def total(params: Any, tokens_BT: Array) -> Array:
        hidden_BTM = model.apply(params, tokens_BT, segments_BT=segments_BT).hidden
        return jnp.sum((hidden_BTM * probe_BTM)[:, 7:])

    return jax.jit(jax.grad(total))


def documents() -> np.ndarray:
    """A row of two documents that share no token id."""
    generator = np.random.default_rng(2)
    parts = [generator.choice(np.arange(60)[ids], size, replace=False) for ids, size in ((FIRST, 7), (SECOND, 6))]
    return np.concatenate(parts)[None].astype(np.int32)


@pytest.mark.parametrize("isolate", [True, False])
def test_gradient_across_documents_is_zero_where_they_are_isolated(isolate: bool) -> None:
    params = small.parameters(small.july2026())
    grads = gradient_of_second_document(isolate)(params, documents())
    tables = [grads["ends"]["embed"], *grads["layers"][1]["mixer"]["value_embedding"]]
    for table in tables:
        assert np.any(table[SECOND])
        assert np.any(table[FIRST]) != isolate


@pytest.mark.parametrize("isolate", [True, False])
def test_smear_alone_stops_at_the_boundary(isolate: bool) -> None:
    config = small.july2026()
    params = small.parameters(config)
    for layer in params["layers"]:  # nothing else moves from token to token
        layer["mixer"]["o"] *= 0
    tokens_BT = documents()
    table_VM = gradient_of_second_document(isolate)(params, tokens_BT)["ends"]["embed"]
    assert np.any(table_VM[tokens_BT[0, 6]]) != isolate
    assert not np.any(table_VM[tokens_BT[0, :6]])


def test_documents_see_each_other_in_the_october_family() -> None:
    config = small.october2025()
    model, params = Transformer(config), jax.tree.map(jnp.asarray, small.parameters(config))
    tokens_BT = np.random.default_rng(4).integers(0, config.vocab, (1, 10)).astype(np.int32)
    segments_BT = np.repeat([[0, 1]], 5, axis=1).astype(np.int32)
    hidden = jax.jit(lambda segments_BT: model.apply(params, tokens_BT, segments_BT=segments_BT)[0])
    np.testing.assert_array_equal(hidden(segments_BT), hidden(None))


def test_each_part_of_a_layer_draws_from_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawing(module: Any) -> Any:
        class Drawing(module):  # type: ignore[misc]
            def __call__(self, x_BTM: Array, context: Any, *cache: Any) -> Any:
                *results, _ = super().__call__(x_BTM, context, *cache)
                name = "/".join(self.path)
                drawn = 0.0 if context.key is None else jax.random.uniform(context.key)
                return *results, Aux(statistics={name: (drawn, 1.0)})

        return Drawing

    config = small.october2025(depth=1)
    for table, part in ((MIXERS, config.pattern[0].mixer), (MLPS, config.pattern[0].mlp)):
        monkeypatch.setitem(table, type(part), drawing(table[type(part)]))
    model, params = Transformer(config), jax.tree.map(jnp.asarray, small.parameters(config))
    tokens_BT = np.zeros((1, 4), np.int32)
    statistics = model.apply(params, tokens_BT, key=jax.random.key(0)).statistics
    assert len({float(total) for total, _ in statistics.values()}) == len(statistics) == 2


def test_a_vector_is_no_matrix_of_muon() -> None:
    class Gain(nn.Module):
        @nn.compact
        def __call__(self) -> Array:
            return param(self, "gain", ("width",), (4,), nn.initializers.ones, group="matrices")

    with pytest.raises(ValueError, match=r"gain with axes .* is not a matrix"):
        Gain().init(jax.random.key(0))


def with_tail(**changes: Any) -> Model:
    """Two repeats of the pattern and a layer of another kind, as a deep model whose depth is no multiple of four."""
    plain = small.july2026(depth=4)
    last = dataclasses.replace(plain.pattern[1], mixer=dataclasses.replace(plain.pattern[1].mixer, window=5))
    return dataclasses.replace(plain, **{"depth": 6, "tail": (plain.pattern[0], last), **changes})


def test_layers_after_the_repeats_are_those_of_one_long_pattern() -> None:
    """The same initial values and likelihood as with a stack for every layer, scanned and unrolled."""
    config = with_tail()
    long = dataclasses.replace(config, pattern=config.layers, tail=())
    assert config.layers == long.layers and config.repeats == 2
    one, other = (Transformer(c).unstack(Transformer(c).init(jax.random.key(0))) for c in (config, long))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    for loop in ("scan", "unroll"):
        c = with_tail(layer_loop=loop)
        hidden_BTM = Transformer(c).apply(Transformer(c).init(jax.random.key(0)), np.arange(8, dtype=np.int32)[None])[0]
        expected = Transformer(long).apply(
            Transformer(long).init(jax.random.key(0)), np.arange(8, dtype=np.int32)[None]
        )
        np.testing.assert_allclose(hidden_BTM, expected[0], atol=1e-5)
    scanned, unrolled = (likelihood_and_gradient(with_tail(layer_loop=loop)) for loop in ("scan", "unroll"))
    small.assert_close(scanned, unrolled, 1e-12)
    assert_cached_equals_full(with_tail())
    with pytest.raises(ValueError, match="depth=7 less the tail's 2 is not a multiple of the pattern's 2 layers"):
        with_tail(depth=7)


def test_a_scan_compiles_one_repeat_and_the_tail() -> None:
    def products(depth: int) -> int:
        config = with_tail(depth=depth, layer_loop="scan")
        call = lambda params: Transformer(config).apply(params, np.zeros((1, 8), np.int32)).hidden  # noqa: E731
        return str(jax.make_jaxpr(call)(Transformer(config).shapes())).count("dot_general")

    assert products(6) == products(4) == products(12)
