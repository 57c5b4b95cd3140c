"""jaxchat against the outside: golden files of tests/golden, the float64 references of reference.py, and optax."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from outside import Golden, head_model, read

from configs import recipe
from configs.recipe import Dial
from jaxchat import optim
from jaxchat.export import families
from jaxchat.export.families.nanochat_own import July2026
from jaxchat.export.places import to_params
from jaxchat.model import Transformer
from jaxchat.model.counts import flops_per_token, parameter_counts
from jaxchat.model.dense import attend_row
from jaxchat.objectives.likelihood import Likelihood
from jaxchat.objectives.logprobs import weighted_nll

pytestmark = pytest.mark.quick

PLACES = families.FAMILIES["nanochat"].places
WARMUP = 2  # of the whole optimizer step: at nanochat's 40 the first updates are too small to tell apart


class Results(NamedTuple):
    logits: Any
    loss: Any
    gradients: Any


def run(model: Transformer, params: Any, golden: Golden) -> Results:
    """Logits by the public forward; mean loss and gradients by the objective that training uses."""
    tokens, targets = golden.arrays["tokens"], golden.arrays["targets"]
    weights, segments = jnp.ones(tokens.shape, model.dtype), jnp.zeros_like(tokens)
    batch = {"tokens": tokens, "targets": targets, "weights": weights, "segments": segments}

    def mean(params: Any) -> jax.Array:
        found = functools.partial(Likelihood(), model)(params, batch)
        return found.total / found.weight

    logits = jax.jit(lambda p: model.logits(p, model.apply(p, tokens)[0]))(params)
    return Results(np.asarray(logits), *jax.jit(jax.value_and_grad(mean))(params))


def assert_tree_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Every leaf within `tolerance` of the largest value of the leaf it should equal."""
    for (path, mine), other in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        mine, other = np.asarray(mine), np.asarray(other)
        assert mine.shape == other.shape, (jax.tree_util.keystr(path), mine.shape, other.shape)
        gap = np.abs(mine - other).max() / max(np.abs(other).max(), 1e-30)
        assert gap < tolerance, f"{jax.tree_util.keystr(path)} differs by {gap:.2e} of its largest value"


@pytest.mark.parametrize(("variant", "loop"), [("mha", "unroll"), ("gqa", "scan")])
def test_october_family_equals_transformers(variant: str, loop: str) -> None:
    golden = read(f"nanochat_v1_{variant}")
    config, _ = families.read_config(golden.config)
    model = Transformer(dataclasses.replace(config, layer_loop=loop))
    params = to_params(config, golden.weights, PLACES)
    ours = run(model, params, golden)
    assert np.abs(ours.logits - golden.arrays["logits"]).max() < 1e-4
    np.testing.assert_allclose(ours.loss, golden.arrays["loss"], rtol=1e-6)
    assert_tree_close(ours.gradients, to_params(config, golden.gradients, PLACES), 1e-4)


@pytest.mark.parametrize("variant", ["mha", "gqa"])
def test_greedy_decoding_through_the_cache_equals_transformers_generate(variant: str) -> None:
    golden = read(f"nanochat_v1_{variant}")
    config, _ = families.read_config(golden.config)
    model = Transformer(config)
    params = jax.tree.map(jnp.asarray, to_params(config, golden.weights, PLACES))
    params = model.unstack(params)
    expected = golden.arrays["generated"]
    prompt = len(expected) - 32

    @jax.jit
    def extend(cache: Any, tokens_1T: jax.Array, positions_1T: jax.Array) -> Any:
        hidden_1TM, cache, _, _ = model.apply(params, tokens_1T, positions_BT=positions_1T, cache=cache)
        return model.logits(params, hidden_1TM)[0, -1].argmax(), cache

    cache = model.empty_cache(1, len(expected), write=prompt)
    token, cache = extend(cache, expected[None, :prompt], np.arange(prompt)[None])
    tokens = [*expected[:prompt], token]
    for position in range(prompt, len(expected) - 1):
        token, cache = extend(cache, token[None, None], np.array([[position]]))
        tokens.append(token)
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_head_family_equals_nanochat_and_the_reference(wide: bool) -> None:
    golden = read("nanochat_head")
    c, config = golden.config, head_model(golden.config)
    described = reference.HeadConfig(c["heads"], c["kv_heads"], tuple(c["windows"]), eps=c["eps"])
    theirs = reference.head_forward(golden.weights, golden.arrays["tokens"], described)
    dtype = np.float64 if wide else np.float32
    with jax.enable_x64(wide):
        model = Transformer(config, dtype)
        params = to_params(config, golden.weights, July2026.places)
        ours = run(model, jax.tree.map(lambda w: jnp.asarray(w, dtype), params), golden)
    assert np.abs(theirs - golden.arrays["logits"]).max() < 1e-5  # the file holds float32
    assert np.abs(ours.logits - theirs).max() < (1e-11 if wide else 1e-4)
    np.testing.assert_allclose(ours.loss, golden.arrays["loss"], rtol=1e-12 if wide else 1e-6)
    expected = to_params(config, golden.gradients, July2026.places)
    assert_tree_close(ours.gradients, expected, 1e-6 if wide else 1e-4)


class Mask(NamedTuple):
    """One case of the attention path: grouped heads or not, a window, segments, padding before or after the tokens."""

    kv_heads: int = 4
    window: int | None = None
    segments: bool = False
    padding: str = ""


MASKS = [
    Mask(),
    Mask(kv_heads=2),
    Mask(window=1),
    Mask(window=130, kv_heads=1),
    Mask(segments=True),
    Mask(segments=True, window=3),
    Mask(padding="before"),
    Mask(padding="after", window=40, kv_heads=2),
    Mask(padding="after", segments=True, window=7),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_attention_equals_the_reference_for_every_mask(mask: Mask) -> None:
    rows, length, heads, size = 2, 160, 4, 4  # longer than one block of queries
    generator = np.random.default_rng(5)
    q, k, v = (generator.standard_normal((rows, length, n, size)) for n in (heads, mask.kv_heads, mask.kv_heads))
    segments = np.sort(generator.integers(0, 5, (rows, length)), axis=1) if mask.segments else np.zeros((rows, length))
    segments = segments.astype(np.int32)
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    positions = (np.arange(length)[None] - starts).astype(np.int32)
    if mask.padding == "before":
        positions = np.maximum(np.arange(length)[None] - np.array([[9], [0]]), -1).astype(np.int32)
    elif mask.padding == "after":
        positions[:, 140:] = -1
    theirs = reference.attention(
        q,
        k,
        v,
        q_positions_BT=positions,
        k_positions_BS=positions,
        q_segments_BT=segments,
        k_segments_BS=segments,
        window=mask.window,
    )
    with jax.enable_x64(True):
        where = jnp.asarray(positions), jnp.asarray(segments) if mask.segments else None
        ours = np.asarray(attend_row(*map(jnp.asarray, (q, k, v)), *where, window=mask.window))
    real = positions >= 0
    assert np.isfinite(ours).all()
    assert np.abs(ours - theirs)[real].max() < 1e-12


@pytest.mark.parametrize("softcap", [15.0, None])
def test_likelihood_equals_the_reference(softcap: float | None) -> None:
    generator = np.random.default_rng(11)
    rows, length, width, vocab, padded = 2, 12, 8, 50, 64
    hidden, head = generator.standard_normal((rows * length, width)), 4 * generator.standard_normal((width, vocab))
    targets = generator.integers(0, vocab, rows * length)
    weights = generator.choice([0.0, 0.5, 1.0], rows * length)
    theirs = reference.cross_entropy(hidden, head, targets, weights, softcap)
    head = np.pad(head, [(0, 0), (0, padded - vocab)])
    shape = (rows, length)
    with jax.enable_x64(True):

        def total(hidden_BTM: jax.Array, head_MV: jax.Array) -> jax.Array:
            columns = targets.reshape(shape), weights.reshape(shape)
            return weighted_nll(hidden_BTM, head_MV, *columns, vocab=vocab, softcap=softcap, chunk_tokens=8)

        ours, gradients = jax.value_and_grad(total, argnums=(0, 1))(hidden.reshape(*shape, width), jnp.asarray(head))
        gradients = [np.asarray(gradient) for gradient in gradients]
    np.testing.assert_allclose(ours, theirs.total, rtol=1e-12)
    assert np.abs(gradients[0].reshape(hidden.shape) - theirs.hidden_NM).max() < 1e-12
    assert np.abs(gradients[1][:, :vocab] - theirs.head_MV).max() < 1e-12
    assert not np.any(gradients[1][:, vocab:])


@pytest.mark.parametrize("shape", [(12, 48), (48, 12), (32, 32)], ids=str)
@pytest.mark.parametrize("name", ["POLAR_EXPRESS", "NEWTON_SCHULZ"])
def test_orthogonalisation_equals_optax(name: str, shape: tuple[int, int]) -> None:
    triples = getattr(optim, name)
    x_NRC = np.random.default_rng(2).standard_normal((3, *shape)).astype(np.float32)
    peer = optax.contrib.scale_by_muon(ns_coeffs=triples, beta=0.0, nesterov=False)
    ours = optim.orthogonalise(jnp.asarray(x_NRC), triples, margin=1.0)
    for one, x in zip(ours, x_NRC, strict=True):
        theirs, _ = peer.update(jnp.asarray(x), peer.init(jnp.asarray(x)))
        assert np.abs(one - theirs).max() < 1e-5


def head_optimizer(scale: float, width: int, decay: float, warmup: int = 40) -> optim.Optimizer:
    """nanochat HEAD's groups as reference.GROUPS states them, at a batch factor and width."""

    def group(name: str) -> optim.AdamW:
        g = reference.GROUPS[name]
        rate = g.rate * (scale if g.batch_scaled else 1.0) * ((width / 768) ** -0.5 if g.width_scaled else 1.0)
        return optim.AdamW(rate, *g.betas, g.decay)

    names = ("lm_head", "wte", "value_embeds", "resid_lambdas", "x0_lambdas", "smear_gate")
    return optim.Optimizer(optim.Muon(reference.MUON_RATE * scale, decay), *map(group, names), warmup_steps=warmup)


def reference_steps(
    state: dict[str, np.ndarray],
    gradients: list[dict[str, np.ndarray]],
    *,
    width: int,
    scale: float,
    decay: float,
    steps: int,
) -> dict[str, np.ndarray]:
    """The weights after as many steps of MuonAdamW as there are gradients."""
    values, states = {name: value.astype(np.float64) for name, value in state.items()}, {}
    for t, gradient in enumerate(gradients):
        rate = scale * reference.learning_rate_factor(t, steps, WARMUP)
        for name, g in gradient.items():
            if name.startswith("transformer.h."):
                before = states.get(name) or reference.muon_init(g)
                values[name], states[name] = reference.muon_step(
                    values[name],
                    g,
                    before,
                    rate=reference.MUON_RATE * rate,
                    momentum=reference.muon_momentum(t, steps),
                    decay=decay * reference.muon_decay_factor(t, steps),
                )
                continue
            group = next(group for part, group in reference.GROUPS.items() if part in name)
            base = group.rate * (rate if group.batch_scaled else rate / scale)
            base *= (width / 768) ** -0.5 if group.width_scaled else 1.0
            before = states.get(name) or reference.adamw_init(g)
            values[name], states[name] = reference.adamw_step(
                values[name], g, before, rate=base, betas=group.betas, decay=group.decay
            )
    return values


def test_whole_optimizer_step_equals_the_reference() -> None:
    golden = read("nanochat_head")
    config, width, scale, decay, steps = head_model(golden.config), golden.config["width"], 0.7, 40.0, 20
    generator = np.random.default_rng(3)
    gradients = [
        {name: 0.01 * generator.standard_normal(w.shape) for name, w in golden.weights.items()} for _ in range(3)
    ]
    theirs = reference_steps(golden.weights, gradients, width=width, scale=scale, decay=decay, steps=steps)
    with jax.enable_x64(True):
        transformer = Transformer(config, jnp.float64)
        optimizer = head_optimizer(scale, width, decay, WARMUP)
        tx = optim.make(optimizer, transformer.specs(), steps=steps, dtype=jnp.float64)

        @jax.jit
        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def tree(state: dict[str, np.ndarray]) -> Any:
            place = to_params(config, state, July2026.places)
            return jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), place)

        params = tree(golden.weights)
        state = tx.init(params)
        for gradient in gradients:
            params, state = step(params, state, tree(gradient))
    assert_tree_close(params, to_params(config, theirs, July2026.places), 1e-7)  # schedules are float32


@pytest.mark.parametrize("steps", [30, 100, 600, 2_000])
def test_schedules_equal_the_reference(steps: int) -> None:
    config = head_optimizer(1.0, 768, 0.28)
    t = np.arange(steps)
    ours = [
        jax.vmap(schedule(config, steps))(t)
        for schedule in (optim.learning_rate_factor, optim.muon_momentum, optim.muon_decay)
    ]
    theirs = (
        [reference.learning_rate_factor(i, steps) for i in t],
        [reference.muon_momentum(i, steps) for i in t],
        [0.28 * reference.muon_decay_factor(i, steps) for i in t],
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("size", reference.SIZES, ids=lambda size: f"d{size.depth}")
def test_dial_gives_nanochats_sizes(size: reference.Size) -> None:
    dial = Dial(depth=size.depth, family="july2026")
    config = recipe.model(dial)
    counts = parameter_counts(config)
    flops = flops_per_token(config, dial.row_length)["total"]
    heads = {layer.mixer.heads for layer in config.pattern}
    assert heads == {size.heads}
    scaling = recipe.scaling_parameters(dial)
    assert reference.Size(dial.depth, config.width, size.heads, counts["total"], scaling, flops) == size


@pytest.mark.parametrize(
    ("depth", "windows", "value_embeddings"),
    [(5, "SSSLL", "*-*-*"), (6, "SSSLSL", "-*-*-*"), (8, "SSSLSSSL", "-*-*-*-*")],
    ids=lambda value: str(value),
)
def test_dial_puts_windows_and_value_embeddings_where_nanochat_does(
    depth: int, windows: str, value_embeddings: str
) -> None:
    config = recipe.model(Dial(depth=depth, family="july2026"))
    mixers = [layer.mixer for layer in config.layers]
    assert [mixer.window for mixer in mixers] == [{"S": 512, "L": None}[letter] for letter in windows]
    assert "".join("-" if mixer.value_embedding is None else "*" for mixer in mixers) == value_embeddings


@pytest.mark.parametrize("row", reference.HORIZONS, ids=lambda row: f"d{row.depth}-ratio{row.ratio}")
def test_dial_gives_nanochats_horizon(row: reference.Horizon) -> None:
    dial = Dial(depth=row.depth, ratio=row.ratio, family="july2026")
    assert (recipe.batch_tokens(dial), recipe.steps(dial)) == (row.batch_tokens, row.steps)
    ours, width = recipe.optimizer(dial), dial.width
    expected = head_optimizer(reference.horizon(row.depth, row.ratio).rate_factor, width, row.decay)
    np.testing.assert_allclose(ours.muon.weight_decay, row.decay, rtol=1e-4)
    ours = dataclasses.replace(ours, muon=dataclasses.replace(ours.muon, weight_decay=row.decay))
    for mine, other in zip(
        jax.tree.leaves(dataclasses.asdict(ours)), jax.tree.leaves(dataclasses.asdict(expected)), strict=True
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-12)


def test_smaller_batch_follows_the_formulas() -> None:
    dial = Dial(depth=4, family="july2026", steps=600, batch_tokens=16_384, vocab=8_192, row_length=512)
    expected = reference.horizon(4, dial.ratio, batch_tokens=16_384, vocab=8_192, row_length=512)
    assert expected.rate_factor == pytest.approx(0.1768, abs=1e-4)
    muon = recipe.optimizer(dial).muon
    assert muon.learning_rate == pytest.approx(0.02 * expected.rate_factor)
    assert muon.weight_decay == pytest.approx(expected.decay, rel=1e-6)
    assert recipe.steps(dial) == 600
