"""Mixture of experts: equal to transformers, no token dropped, even loads, and experts on several devices."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from weights import checksum, random_weight

from configs import recipe
from jaxchat import optim, sharding
from jaxchat.data import tinyworld
from jaxchat.model import GQA, Int8, Layer, Model, MoE, SwiGLU, Transformer
from jaxchat.model.counts import flops_per_token, parameter_counts
from jaxchat.model.experts import MixtureOfExperts, by_mask, by_sorting, choose
from jaxchat.model.part import Context, Spec, Static
from jaxchat.objectives.likelihood import Likelihood
from jaxchat.train import init_state, state_placements, train_step

pytestmark = pytest.mark.quick

GOLDEN = np.load(Path(__file__).parent / "golden" / "blocks.npz")
WIDTH, LENGTH = 32, 16
TOP2 = MoE(experts=8, active=2, hidden=12, router="softmax", selection_bias=False)
V3 = MoE(
    experts=8, active=3, hidden=12, shared=24, groups=4, top_groups=2, scale=2.5, router="sigmoid", selection_bias=True
)
V2 = dataclasses.replace(V3, active=2, router="softmax", group_best=1, scale=1.5, normalise=False, selection_bias=False)
BLOCKS = {
    "deepseek_v3": V3,
    "deepseek_v2": V2,
    "mixtral": dataclasses.replace(TOP2, balance_loss=1.0),
    "qwen3_moe": dataclasses.replace(TOP2, normalise=False),
}


def block_weights(name: str, c: MoE) -> dict[str, np.ndarray]:
    """The weights that transformers' block was given."""
    E, F = c.experts, c.hidden
    shapes = {"experts.gate_up_proj": (E, 2 * F, WIDTH), "experts.down_proj": (E, WIDTH, F), "gate.weight": (E, WIDTH)}
    if c.shared:
        shapes |= {f"shared_experts.{part}_proj.weight": (c.shared, WIDTH) for part in ("gate", "up")}
        shapes |= {"shared_experts.down_proj.weight": (WIDTH, c.shared)}
    if c.selection_bias:
        shapes |= {"gate.e_score_correction_bias": (E,)}
    return {key: random_weight(f"{name}/{key}", shape) for key, shape in shapes.items()}


def ours(c: MoE, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    both = arrays["experts.gate_up_proj"].swapaxes(1, 2)
    params = {
        "router": arrays["gate.weight"].T,
        "gate": both[..., : c.hidden],
        "in": both[..., c.hidden :],
        "out": arrays["experts.down_proj"].swapaxes(1, 2),
    }
    if c.shared:
        named = {"gate": "gate", "in": "up", "out": "down"}
        params |= {f"shared_{n}": arrays[f"shared_experts.{their}_proj.weight"].T for n, their in named.items()}
    return params | ({"selection_bias": arrays["gate.e_score_correction_bias"]} if c.selection_bias else {})


@functools.cache
def block(name: str, path: Any) -> tuple[Any, Any, Any]:
    """Output, losses and statistics, and gradients of parameters and input, of a block with transformers' weights."""
    c = dataclasses.replace(BLOCKS[name], path=path)
    arrays = block_weights(name, c)
    x_BTM, probe = (random_weight(f"{name}/{key}", (2, LENGTH, WIDTH)) for key in ("x", "probe"))
    assert checksum({**arrays, "x": x_BTM, "probe": probe}) == GOLDEN[f"{name}/checksum"]
    tokens_BT = jnp.zeros((2, LENGTH), jnp.int32)
    module = MixtureOfExperts(c, Static(WIDTH, 64))

    def call(params: Any, x_BTM: Any) -> Any:
        y_BTM, aux = module.apply({"params": params}, x_BTM, Context(tokens_BT, tokens_BT, None))
        return jnp.sum(y_BTM * probe), (y_BTM, aux)

    with jax.default_matmul_precision("highest"):
        grads, (y_BTM, aux) = jax.jit(jax.grad(call, argnums=(0, 1), has_aux=True))(ours(c, arrays), x_BTM)
    return y_BTM, aux, grads


@pytest.mark.parametrize("path", ["masked", "sorted"])
@pytest.mark.parametrize("name", BLOCKS)
def test_experts_equal_transformers(name: str, path: str) -> None:
    y_BTM, aux, (grads, dx_BTM) = block(name, path)
    for found, theirs in ((y_BTM, "y"), (dx_BTM, "dx"), (grads["router"].T, "gradients/gate.weight")):
        small.assert_close(found, GOLDEN[f"{name}/{theirs}"], 1e-5)
    counts = GOLDEN[f"{name}/counts"]
    share, statistics = counts / counts.sum(), {key: float(total) for key, (total, _) in aux.statistics.items()}
    assert statistics["experts_busiest"] == pytest.approx(share.max())
    assert statistics["experts_imbalance"] == pytest.approx(counts.max() / counts.mean())
    assert statistics["experts_entropy"] == pytest.approx(-np.sum(share * np.log(share)) / np.log(8), rel=1e-5)
    if name == "mixtral":  # transformers' shares of the tokens add up to the experts of a token.
        total, rows = aux.losses["balance_loss"]
        assert float(total / rows) == pytest.approx(float(GOLDEN["mixtral/balance"]) / 2, rel=1e-5)
    if name == "deepseek_v3":  # The gradient of the bias is the excess of its expert's tokens.
        excess = np.asarray(grads["selection_bias"]) * 2.0**80
        np.testing.assert_array_equal(excess, 8 * counts - counts.sum())


def test_the_bias_chooses_and_does_not_weigh() -> None:
    """A large bias sends every token to its expert, with the gate of the score alone."""
    score_BTE = jnp.asarray(np.random.default_rng(0).random((1, 5, 8), np.float32))
    c = dataclasses.replace(V3, groups=1, top_groups=1, normalise=False, scale=1.0)
    chosen, gates = choose(c, score_BTE, 9.0 * jnp.eye(8)[6])
    assert np.all(chosen[..., 0] == 6)
    np.testing.assert_array_equal(gates[..., 0], score_BTE[..., 6])


@pytest.mark.parametrize("product", ["blocks", "ragged_dot", "int8"])
@pytest.mark.parametrize("loads", ["one", "none", "some"])
def test_no_token_is_dropped(loads: str, product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sorted path equals the masked one, with its gradients, where every token wants the same experts, and where
    some or all want those of other devices."""
    if product == "ragged_dot":
        monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    c = MoE(experts=6, active=2, hidden=5)
    generator = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)  # noqa: E731
    weights, probe = {"gate": draw(3, 8, 5), "in": draw(3, 8, 5), "out": draw(3, 5, 8)}, draw(41, 8)
    own_E = jnp.arange(3) + (3 if loads == "none" else 0)  # The experts of this device; others compute the rest.
    chosen = {"one": np.tile([1, 2], (41, 1)), "none": np.tile([0, 1], (41, 1))}.get(
        loads, np.stack([generator.permutation(6)[:2] for _ in range(41)])
    )

    def result(path: Any, x_NM: Any, gates: Any, weights: Any) -> Any:
        y_NM = path(c, x_NM, jnp.asarray(chosen), gates, own_E, weights, Int8() if product == "int8" else None)
        return jnp.sum(y_NM * probe), y_NM

    call = jax.jit(jax.grad(result, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    arguments = (draw(41, 8), draw(41, 2), weights)
    wanted, found = call(by_mask, *arguments), call(by_sorting, *arguments)
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, atol=1e-4), found, wanted)
    assert np.any(wanted[1]) == (loads != "none")


def model(moe: MoE, **fields: Any) -> Model:
    layer = Layer(GQA(heads=2, kv_heads=2, head_dim=8), moe)
    return Model(**{"vocab": 128, "width": 16, "depth": 2, "pattern": (layer,), "layer_loop": "scan"} | fields)


def training(config: Model, dtype: Any = jnp.float32) -> tuple[Any, Any, Any]:
    """Transformer, optimizer and the step of a run of 1,000 steps."""
    transformer = Transformer(config, dtype)
    settings = recipe.optimizer(recipe.Dial(depth=2, steps=1000, batch_tokens=4096))
    tx = optim.make(settings, transformer.specs(), steps=1000, dtype=dtype)
    return transformer, tx, functools.partial(train_step, loss=functools.partial(Likelihood(), transformer), tx=tx)


BALANCES = {
    "bias": MoE(8, 2, 16),
    "loss": MoE(8, 2, 16, selection_bias=False, balance_loss=0.02, z_loss=0.001, router="softmax"),
}


@pytest.mark.parametrize("balance", BALANCES)
def test_loads_become_even_within_100_steps(balance: str) -> None:
    """On the village's prose, as bytes. Without a balance the imbalance stays near 3 (docs/log.md)."""
    text = "\n".join(tinyworld.document("train", i) for i in range(120)).encode("ascii", "replace")
    rows, length, steps = 8, 32, 100
    ids = np.frombuffer(text, np.uint8)[: rows * steps * length + 1].astype(np.int32)
    shape = (steps, 1, rows, length)
    batches = {"tokens": ids[:-1].reshape(shape), "targets": ids[1:].reshape(shape)}
    batches |= {"segments": np.zeros(shape, np.int32), "weights": np.ones(shape, np.float32)}
    transformer, tx, step = training(model(BALANCES[balance], depth=1))
    state = init_state(transformer, tx, jax.random.key(0))
    _, metrics = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))(state, batches)
    loss, imbalance = (np.asarray(metrics[name]) for name in ("loss", "experts_imbalance"))
    assert loss[-10:].mean() < 0.8 * loss[0]
    assert imbalance[-20:].mean() < 0.7 * imbalance[:20].mean()
    assert ("balance_loss" in metrics) == ("router_z_loss" in metrics) == (balance == "loss")


def run(config: Model, mesh: sharding.Mesh, micro: int, steps: int) -> Any:
    """The parameters after some steps on a mesh, in float64."""
    transformer, tx, step = training(config, jnp.float64)
    made, batch = sharding.make_mesh(mesh, rows=8 // micro), small.batch(8, 12, config.vocab, np.float64)
    shapes = jax.eval_shape(lambda: init_state(transformer, tx, jax.random.key(0)))
    placed = state_placements(made, shapes, transformer.axes())
    with jax.set_mesh(made):
        params = jax.device_put(small.parameters(config, np.float64, scale=0.2), placed.params)
        zero = np.zeros((), np.int32)
        state = shapes._replace(step=zero, params=params, skipped_in_row=zero, skipped=zero)
        state = jax.device_put(state._replace(optimizer=jax.jit(tx.init)(params)), placed)
        step = jax.jit(step, out_shardings=(placed, None))
        columns = {name: x.reshape(micro, -1, *x.shape[1:]) for name, x in batch.items()}
        for _ in range(steps):
            state, _ = step(state, sharding.put_batch(made, columns))
    return jax.tree.map(np.asarray, state.params)


def test_the_selection_bias_does_not_depend_on_micro_batches_and_devices() -> None:
    """After three steps it is equal to the bit; Muon's matrices of experts on several devices are those of one."""
    config = model(MoE(8, 2, 16, shared=8))
    with jax.enable_x64(True):
        one = run(config, sharding.Mesh(1), 1, 3)
        others = run(config, sharding.Mesh(1), 4, 3), run(config, sharding.Mesh(1, 2, 1, 4), 1, 3)
    start = small.parameters(config, np.float64, scale=0.2)["layers"][0]["mlp"]["selection_bias"]
    change = one["layers"][0]["mlp"]["selection_bias"] - start
    assert np.all(np.any(change, axis=1)) and np.abs(change.sum(axis=1)).max() < 1e-12, "a bias is centred"
    for other in others:
        np.testing.assert_array_equal(
            other["layers"][0]["mlp"]["selection_bias"], one["layers"][0]["mlp"]["selection_bias"]
        )
        small.assert_close(other, one, 1e-9)


def test_muon_sees_a_matrix_per_expert() -> None:
    """The update of stacked experts is that of every expert as a parameter of its own."""
    config = model(MoE(3, 2, 16))
    names = ("gate", "in", "out")
    of = lambda tree: {name: tree["layers"][0]["mlp"][name] for name in names}  # noqa: E731
    specs, params = of(Transformer(config).specs()), jax.tree.map(jnp.asarray, of(small.parameters(config)))
    assert all(spec.stack and spec.group == "matrices" for spec in specs.values())
    grads = of(small.parameters(config, seed=1))

    def split(tree: Any, cut: Any) -> Any:
        return {f"{name}{e}": cut(leaf, e) for name, leaf in tree.items() for e in range(3)}

    def without_stack(spec: Spec, e: int) -> Spec:
        return dataclasses.replace(spec, axes=(spec.axes[0], *spec.axes[2:]), stack=False)

    def update(specs: Any, params: Any, grads: Any) -> Any:
        tx = optim.make(recipe.optimizer(recipe.Dial(depth=2, steps=20, batch_tokens=4096)), specs, steps=20)
        return jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params)[0])(params, grads)

    one = lambda leaf, e: leaf[:, e]  # noqa: E731
    alone = update(split(specs, without_stack), split(params, one), split(grads, one))
    small.assert_close(split(update(specs, params, grads), one), alone, 1e-5)


def test_a_model_without_experts_has_no_state_of_theirs() -> None:
    """Its checkpoints are those of earlier versions."""
    for mlp, groups in ((SwiGLU(24), set()), (MoE(4, 2, 8), {"router", "selection_bias"})):
        transformer, tx, _ = training(model(mlp))
        state = jax.eval_shape(lambda t=transformer, x=tx: x.init(t.init(jax.random.key(0))))
        assert groups == set(state[0].inner_states) & {"router", "selection_bias"}


def test_active_parameters_and_flops_leave_out_the_other_experts() -> None:
    config = model(MoE(8, 2, 16, shared=24))
    counts, flops = parameter_counts(config), flops_per_token(config, 32)
    per_expert = 3 * 16 * 16
    assert counts["total"] - counts["active"] == 2 * 6 * per_expert
    assert flops["mlp"] == 6 * 2 * (16 * 8 + 2 * per_expert + 3 * 16 * 24)
    dense = parameter_counts(model(SwiGLU(24)))
    assert dense["total"] == dense["active"]


def test_losses_are_means_over_rows_and_tokens() -> None:
    """So that micro-batches of equal weight add up to the batch; and they are what their equations say."""
    c = MoE(4, 2, 8, balance_loss=0.5, z_loss=0.25, router="softmax")
    module, generator = MixtureOfExperts(c, Static(16, 64)), np.random.default_rng(0)
    context = Context(jnp.zeros((4, 6), jnp.int32), jnp.zeros((4, 6), jnp.int32), None)
    params = jax.tree.map(lambda w: w[0], small.parameters(model(c), scale=0.5)["layers"][0]["mlp"])
    x_BTM = generator.standard_normal((4, 6, 16)).astype(np.float32)
    call = jax.jit(
        lambda x, params: module.apply({"params": params}, x, context._replace(tokens_BT=x[..., 0]))[1].losses
    )
    whole, halves = call(x_BTM, params), [call(x_BTM[rows], params) for rows in (slice(2), slice(2, 4))]
    for name, (total, weight) in whole.items():
        parts = [half[name] for half in halves]
        np.testing.assert_allclose(total / weight, np.mean([t / w for t, w in parts]), rtol=1e-5)
    z = x_BTM.astype(np.float64) @ np.asarray(params["router"], np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    best = np.argsort(-(p + params["selection_bias"]), axis=-1)[..., :2]
    share = np.stack([[np.mean(row == e) for e in range(4)] for row in best])
    np.testing.assert_allclose(
        whole["balance_loss"][0] / 4, 0.5 * 4 * np.sum(share * p.mean(1), axis=1).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        whole["router_z_loss"][0] / 24, 0.25 * np.mean(np.log(np.exp(z).sum(-1)) ** 2), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"active": 1}, "active=1 has normalised gates of 1"),
        ({"active": 8}, "active=8 must lie between 1 and experts=8 less one"),
        ({"groups": 3}, "experts=8 is not a multiple of groups=3"),
        ({"groups": 4, "active": 3}, "top_groups=1 of 4 groups cannot hold 3 experts"),
        ({"groups": 4, "group_best": 3}, "group_best=3 must lie between 1 and the 2 experts of a group"),
        ({"z_loss": float("nan")}, "z_loss=nan must be finite"),
        ({"hidden": 0}, "hidden=0 must be positive"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(MoE(8, 2, 16), **change)


def test_experts_that_do_not_divide_over_a_mesh_are_refused() -> None:
    transformer = Transformer(model(MoE(6, 2, 16)))
    mesh = sharding.make_mesh(sharding.Mesh(2, 1, 1, 4), rows=8)
    with pytest.raises(ValueError, match=r"experts=6 of .* is not a multiple of expert=4: choose"):
        sharding.placements(mesh, transformer.shapes(), transformer.axes())


def test_decoding_keeps_the_router_in_float32() -> None:
    """A rounded router would choose other experts than the one that was trained."""
    transformer = Transformer(model(MoE(4, 2, 8)), jnp.bfloat16)
    mlp = jax.eval_shape(lambda: transformer.unstack(transformer.init(jax.random.key(0))))["layer"][0]["mlp"]
    types = {name: str(leaf.dtype) for name, leaf in mlp.items()}
    assert types.pop("router") == types.pop("selection_bias") == "float32"
    assert set(types.values()) == {"bfloat16"}
