"""What every row of the tables of parts must satisfy, shown on the models of parts.py.

Cached and full, micro-batches and one batch, eight devices and one, scanned with rematerialisation and not, documents
packed and alone, FLOPs and a count of them. Each relation is computed in float64 with one compiled gradient per model,
beside the program that it is compared with.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parts
import pytest
import small
from parts import EXAMPLES, LENGTH, ROWS, TABLES

from jaxchat.model import Layer, Transformer
from jaxchat.model.counts import flops_per_token
from jaxchat.objectives.likelihood import Likelihood
from jaxchat.objectives.policy import PolicyGradient
from jaxchat.optimizer import Optimizer

FLOOR = 1e-6  # Without rotation the bias of keys has a gradient of rounding errors, for it moves all scores alike.
every_example = pytest.mark.parametrize("name", EXAMPLES)


def test_every_row_of_every_table_has_an_example() -> None:
    used = set().union(*(parts.rows_of(example.model) for example in EXAMPLES.values()))
    assert used == {(table, row) for table, rows in TABLES.items() for row in rows}


def add(*results: parts.Result) -> tuple[Any, Any, Any]:
    return jax.tree.map(lambda *leaves: sum(leaves), *((r.total, r.weight, r.gradients) for r in results))


@every_example
def test_micro_batches_and_eight_devices_are_one_batch_on_one(name: str) -> None:
    """Two micro-batches on one device have the gradient of one batch on a mesh of eight."""
    example = EXAMPLES[name]
    both = parts.batch(2 * ROWS, example.model.vocab)
    halves = [{column: rows[half] for column, rows in both.items()} for half in (slice(ROWS), slice(ROWS, None))]
    on_mesh = parts.result_on_mesh(example, both)
    small.assert_close(add(on_mesh), add(*(parts.result(example.model, half) for half in halves)), 1e-10, FLOOR)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(on_mesh.gradients)), "a parameter without a gradient"


@every_example
def test_scan_and_remat_change_nothing(name: str) -> None:
    plain = EXAMPLES[name].model
    assert (plain.layer_loop, plain.remat) == ("unroll", "none")
    config, batch = dataclasses.replace(plain, layer_loop="scan", remat="full"), parts.batch(ROWS, plain.vocab)
    small.assert_close(parts.result(config, batch), parts.result(plain, batch), 1e-12, FLOOR)


@every_example
def test_cached_equals_full(name: str) -> None:
    config = EXAMPLES[name].model
    batch = parts.batch(ROWS, config.vocab)
    batch["segments"][:] = 0
    logits_BTV = parts.result(config, batch).logits
    with jax.enable_x64(True):
        cache = parts.assert_cached_equals(config, parts.parameters(config), batch["tokens"], logits_BTV)
    for layer, own in zip(config.layers, cache.layers, strict=True):
        window = getattr(layer.mixer, "window", None)
        slots = LENGTH if window is None else window + 1 + parts.PIECE
        assert {leaf.shape[2] for leaf in own} == {slots}
        assert window is None or slots < 13, "no ring came round"


SIZES = (5, 4, 7)  # Of the documents in a row.


def packed(vocab: int) -> dict[str, np.ndarray]:
    """Documents without a common token: in the first row all three, then each of them alone, with others behind it.

    Only the last document of the first row has weights.
    """
    generator, batch = np.random.default_rng(2), parts.batch(ROWS, vocab)
    ids = np.split(generator.permutation(vocab), 4)
    documents = [generator.choice(own, size, replace=False) for own, size in zip(ids, SIZES)]
    rows = [np.concatenate(documents)]
    rows += [np.concatenate([d, generator.choice(ids[3], LENGTH - len(d))]) for d in documents]
    batch["tokens"] = np.stack(rows).astype(np.int32)
    batch["segments"] = np.repeat([[3, 5, 9]], SIZES, axis=1).repeat(ROWS, axis=0).astype(np.int32)
    for row, size in enumerate(SIZES, start=1):
        batch["segments"][row] = np.arange(LENGTH) >= size
    batch["weights"] *= 0
    batch["weights"][0, -SIZES[-1] :] = 1
    return batch


@every_example
def test_documents_are_isolated(name: str) -> None:
    """A document has the logits that it has alone, and no token of another one has a gradient."""
    config = EXAMPLES[name].model
    assert config.isolate_documents and not config.tied, "an example shows isolation, and its embedding is not the head"
    batch = packed(config.vocab)
    found = parts.result(config, batch)
    alone = np.concatenate([found.logits[row, :size] for row, size in enumerate(SIZES, start=1)])
    np.testing.assert_allclose(found.logits[0], alone, rtol=0, atol=1e-11)
    own, specs = batch["tokens"][0, -SIZES[-1] :], jax.tree.leaves(Transformer(config).specs())
    for leaf, spec in zip(jax.tree.leaves(found.gradients), specs, strict=True):
        axis = next((i for i, name in enumerate(spec.axes) if name in ("vocab", "tokens")), None)
        if axis is not None and spec.group != "head" and not EXAMPLES[name].losses:
            by_token = np.moveaxis(leaf, axis, 0)
            assert np.any(by_token[own])
            assert not np.any(np.delete(by_token, own, axis=0)), "another document has a gradient"


@every_example
def test_flops_equal_a_count(name: str) -> None:
    """Three times the products of the forward pass, which computes all keys of a short row whatever the window."""
    config, _, counted, _ = EXAMPLES[name]

    def whole(layer: Layer) -> Layer:
        window = {"window": None} if hasattr(layer.mixer, "window") else {}
        return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **window))

    config = dataclasses.replace(config, pattern=tuple(map(whole, config.pattern)))
    if counted is None:
        transformer, tokens_1T = Transformer(config), np.zeros((1, LENGTH), np.int32)
        forward = lambda params: transformer.logits(params, transformer.apply(params, tokens_1T).hidden)  # noqa: E731
        counted = 3 * parts.product_flops(jax.make_jaxpr(forward)(transformer.shapes()).jaxpr) // LENGTH
    assert flops_per_token(config, LENGTH)["total"] == counted


@every_example
def test_a_part_says_what_others_ask_of_it(name: str) -> None:
    """Its cache has axes for every array and fits any size; its parameters name groups of the optimizer; it keeps the
    compute type, in training with every backend that computes densely."""
    config, rows = EXAMPLES[name].model, 3
    transformer = Transformer(config)
    groups = {field.name for field in dataclasses.fields(Optimizer)} | {"matrices"}
    for spec in jax.tree.leaves(transformer.specs()):
        assert spec.group in groups and 1 <= spec.inputs < max(len(spec.axes), 2)
    for attention in ("xla", "xla_remat"):
        half = Transformer(config, jnp.bfloat16, attention=attention)
        call = functools.partial(half.apply, tokens_BT=np.zeros((2, 8), np.int32), key=jax.random.key(0))
        shapes = jax.eval_shape(lambda p: jax.vjp(lambda p: call(p).hidden, p), transformer.shapes())  # noqa: B023
        assert shapes[0].dtype == jnp.bfloat16
    long, short = (transformer.empty_cache(rows, length, write=2).layers for length in (12, 8))
    for layer, cache, like in zip(config.layers, long, short, strict=True):
        assert [leaf.ndim for leaf in cache] == [len(axes) for axes in cache.axes]
        assert [axes[0] for axes in cache.axes] == ["batch"] * len(cache)
        smaller = cache.resize(jnp.full(rows, 5), like)
        assert jax.tree.map(jnp.shape, smaller) == jax.tree.map(jnp.shape, like)
        module = parts.MIXERS[type(layer.mixer)]
        assert module.matmul_parameters(layer.mixer, config.width) > 0
        # A ring forgets what its window has passed; a cache that keeps all grows with the row.
        assert module.keeps_all(layer.mixer) == any(a.shape != b.shape for a, b in zip(cache, like))


DROPPING = [name for name, example in EXAMPLES.items() if example.model.dropout]


def without_dropout(value: Any) -> Any:
    """A configuration in which every rate of dropout is 0."""
    if isinstance(value, tuple):
        return tuple(map(without_dropout, value))
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    changed = {name: 0.0 if name == "dropout" else without_dropout(part) for name, part in fields.items()}
    return dataclasses.replace(value, **changed)  # type: ignore[type-var]


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_needs_a_key_and_keeps_the_mean_of_linear_parts(name: str) -> None:
    """Without a key, so in scoring and decoding, the model is the one without dropout to the bit. With keys, embedding
    and residual update are themselves on average; weights of attention are so as well, and the update is linear in
    them. Averages lie within five standard errors."""
    config = EXAMPLES[name].model
    layer = dataclasses.replace(config.pattern[0], placement="before")
    alone = dataclasses.replace(config, pattern=(layer,), depth=1, final_norm=False)
    params, tokens_BT = jax.tree.map(jnp.asarray, small.parameters(alone)), parts.batch(2, config.vocab)["tokens"]
    params["layers"][0]["mlp"]["out"] *= 0
    if "out_bias" in params["layers"][0]["mlp"]:
        params["layers"][0]["mlp"]["out_bias"] *= 0

    def hidden(config: Any, key: Any = None) -> Any:
        return Transformer(config).apply(params, tokens_BT, key=key).hidden

    def sampled(config: Any) -> np.ndarray:
        draw = jax.jit(jax.vmap(lambda key: hidden(config, key)))
        return np.asarray(draw(jax.random.split(jax.random.key(1), 2000)))

    plain = without_dropout(alone)
    np.testing.assert_array_equal(hidden(alone), hidden(plain))
    np.testing.assert_array_equal(hidden(plain, jax.random.key(0)), hidden(plain))
    embedding = dataclasses.replace(alone, pattern=plain.pattern)
    mixer = dataclasses.replace(layer, dropout=0.0)
    cases = {
        "attention": dataclasses.replace(plain, pattern=(mixer,)),
        "residual": dataclasses.replace(plain, pattern=(dataclasses.replace(plain.pattern[0], dropout=0.2),)),
    }
    assert np.std(sampled(embedding), axis=0).min() > 0, "the embedding is not dropped"
    for part, one in cases.items():
        samples = sampled(one)
        assert np.std(samples, axis=0).max() > 0.01, f"{part} is not dropped"
        error = (samples.mean(axis=0) - hidden(plain)) / (samples.std(axis=0) / len(samples) ** 0.5 + 1e-5)
        assert np.abs(error).max() < 5, part


def test_an_objective_that_drops_nothing_gives_no_key() -> None:
    class Plain(Likelihood):
        drops = False

    config = EXAMPLES[DROPPING[0]].model
    model, params, batch = Transformer(config), small.parameters(config), parts.batch(2, config.vocab)
    plain, *keyed = (
        float(objective(model, params, batch, key).total)
        for objective, key in ((Plain(), None), (Plain(), jax.random.key(0)), (Likelihood(), jax.random.key(0)))
    )
    assert keyed[0] == plain != keyed[1]
    assert not PolicyGradient.drops, "in RL the model that is trained is the one that was sampled"
