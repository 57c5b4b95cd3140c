"""Products in eight bits: against NumPy and ml_dtypes, and the relations that training with them must keep."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import small
from test_sharding import keep_gradient, train
from test_sharding import model as divisible

from jaxchat import checkpoint, command_line, compilation
from jaxchat.errors import UserError
from jaxchat.experiment import RESUMABLE, Experiment
from jaxchat.model import Float8, Int8, Transformer, quantized
from jaxchat.model.products import product
from jaxchat.model.quantized import Matmul
from jaxchat.objectives.likelihood import Likelihood
from jaxchat.serialization import from_json, to_json
from jaxchat.upgrades import FORMAT

E4M3, E5M2, INT8 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8
MATMULS = (Int8(), Int8(weight_gradient=True), Float8(), Float8("row"))
# By type: factors of x w, of g w^T and of x^T g, and whether rows have their own scales.
WRITTEN: dict[Matmul, Any] = {
    Int8(): ((INT8, INT8), (INT8, INT8), None, True),
    Int8(weight_gradient=True): ((INT8, INT8), (INT8, INT8), (INT8, INT8), True),
    Float8(): ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), False),
    Float8("row"): ((E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), True),
}
N, K, F = 24, 160, 40

every = pytest.mark.parametrize("matmul", MATMULS, ids=str)
pytestmark = pytest.mark.quick


def drawn(seed: int = 0, spread: float = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (N, K), w (K, F) and the gradient of x w: normal, far apart in magnitude, rows over 2 * `spread` decades."""
    generator = np.random.default_rng(seed)
    x, w, g = (generator.standard_normal(shape) for shape in ((N, K), (K, F), (N, F)))
    rows = 10.0 ** generator.uniform(-spread, spread, (N, 1))
    return tuple(a.astype(np.float32) for a in (x * 3e-3 * rows, w * 70, g * 1e-6 * rows))  # type: ignore[return-value]


def rounded(a: np.ndarray, dtype: Any, axis: int | None) -> np.ndarray:
    """What is left of `a` in an eight-bit type with scales along an axis, float64."""
    largest = np.abs(a).max(axis=axis, keepdims=True)
    if dtype is INT8:
        return np.rint(a * (np.float32(127) / largest)).astype(np.float64) * (largest / np.float32(127))
    scale = 2.0 ** np.floor(np.log2(float(ml_dtypes.finfo(dtype).max) / largest.astype(np.float64)))
    return (a * scale).astype(np.float32).astype(dtype).astype(np.float64) / scale


def expected(a: np.ndarray, b: np.ndarray, pair: Any, by_row: bool) -> np.ndarray:
    if pair is None:
        return a.astype(np.float64) @ b
    return rounded(a, pair[0], 1 if by_row else None) @ rounded(b, pair[1], 0 if by_row else None)


def experiment(*words: str, stage: str = "pretrain") -> Experiment:
    return command_line.load([f"--config={Path(__file__).parent.parent}/configs/tiny.py:{stage}", *words])


@functools.cache
def results(matmul: Matmul) -> Any:
    """x w and its gradients by x and w."""

    @jax.jit
    def run(x: Any, w: Any, g: Any) -> Any:
        y, pullback = jax.vjp(lambda x, w: product(x, w, matmul), x, w)
        return y, *pullback(g)

    return run


def products(x: Any, w: Any, g: Any) -> Any:
    """The factors of the three products."""
    return (x, w), (g, w.T), (x.T, g)


@every
def test_products_and_gradients_equal_numpy_with_the_same_rounding(matmul: Matmul) -> None:
    *pairs, by_row = WRITTEN[matmul]
    x, w, g = drawn()
    for found, (a, b), pair in zip(results(matmul)(x, w, g), products(x, w, g), pairs, strict=True):
        wanted = expected(a, b, pair, by_row)
        assert found.dtype == jnp.float32 and found.shape == wanted.shape
        np.testing.assert_array_less(np.abs(found - wanted), 1e-5 * (np.abs(a).astype(np.float64) @ np.abs(b)))


def noise(a: np.ndarray, dtype: Any, axis: int) -> float:
    """The largest root mean square error that rounding to a type makes, by the root mean square of `a`."""
    if dtype is INT8:  # Uniform within a step of a row.
        steps = np.abs(a).max(axis=axis, keepdims=True) / 127 * np.ones_like(a)
        return float(np.linalg.norm(steps) / np.sqrt(12) / np.linalg.norm(a))
    return float(2.0 ** -ml_dtypes.finfo(dtype).nmant / np.sqrt(12))


@every
def test_errors_are_those_of_the_format(matmul: Matmul) -> None:
    *pairs, _ = WRITTEN[matmul]
    x, w, g = drawn(1, spread=0)
    for found, (a, b), pair in zip(results(matmul)(x, w, g), products(x, w, g), pairs, strict=True):
        exact = a.astype(np.float64) @ b
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        bound = 1e-6 if pair is None else np.hypot(noise(a, pair[0], 1), noise(b, pair[1], 0))
        assert error < 1.1 * bound
        assert pair is None or error > 0.5 * bound, "more exact than eight bits can be"


def test_scales_of_powers_of_two_leave_numbers_of_the_format_as_they_are() -> None:
    generator = np.random.default_rng(2)
    x, w = (generator.integers(-15, 16, shape) * 2.0**shift for shape, shift in (((N, K), -9), ((K, F), 5)))
    x, w = x.astype(np.float32), w.astype(np.float32)
    for matmul in (Float8(), Float8("row")):
        np.testing.assert_array_equal(jax.jit(product, static_argnums=2)(x, w, matmul), x @ w)


@every
def test_zeros_give_zeros_and_finite_gradients(matmul: Matmul) -> None:
    x, w, g = drawn()
    some = (x * (np.arange(N) % 2)[:, None], w * (np.arange(F) % 2), g)
    y, dx, dw = results(matmul)(*some)
    assert not np.any(y[::2]) and not np.any(y[:, ::2]) and np.all(y[1::2, 1::2])
    assert np.all(np.isfinite(dx)) and np.any(dx) and np.all(np.isfinite(dw)) and np.any(dw)
    for whole in ((0 * x, w, g), (x, 0 * w, g), (x, w, 0 * g)):
        for found, (a, b) in zip(results(matmul)(*whole), products(*whole), strict=True):
            assert np.all(np.isfinite(found)) and np.any(found) == (np.any(a) and np.any(b))


@every
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_reaches_the_result(matmul: Matmul, bad: float) -> None:
    by_row = WRITTEN[matmul][-1]
    for at in range(3):
        factors = [a.copy() for a in drawn()]
        factors[at][3, 5] = bad
        y, dx, dw = (np.isfinite(found) for found in results(matmul)(*factors))
        for finite, used in ((y, at in (0, 1)), (dx, at in (1, 2)), (dw, at in (0, 2))):
            assert np.all(finite) != used
        if at == 0:
            assert not np.any(y[3]) and np.all(y[4:]) == by_row


def test_with_scales_by_row_no_token_changes_another() -> None:
    x, w, g = drawn()
    other = x.copy()
    other[0] *= 1000
    for matmul, same in ((Int8(), True), (Float8("row"), True), (Float8(), False)):
        before, after = (results(matmul)(a, w, g)[0] for a in (x, other))
        assert np.array_equal(before[1:], after[1:]) == same
        assert not np.array_equal(before[0], after[0])


@pytest.mark.parametrize(
    ("matmul", "types"),
    [
        (Int8(), ["i8 i8 i32", "i8 i8 i32", "bf16 bf16 f32"]),
        (Int8(weight_gradient=True), ["i8 i8 i32"] * 3),
        (Float8(), ["f8E4M3FN f8E4M3FN f32", "f8E5M2 f8E4M3FN f32", "f8E4M3FN f8E5M2 f32"]),
        (None, ["bf16 bf16 bf16"] * 3),
    ],
    ids=str,
)
def test_what_the_compiler_is_asked_for_are_products_of_eight_bit_numbers(matmul: Matmul, types: list[str]) -> None:
    x, w, g = (jnp.asarray(a, t) for a, t in zip(drawn(), (jnp.bfloat16, jnp.float32, jnp.bfloat16), strict=True))
    asked = []
    for line in results(matmul).lower(x, w, g).as_text().splitlines():
        if "stablehlo.dot_general" in line:
            asked.append(" ".join(part.split(">")[0].split("x")[-1] for part in line.split("tensor<")[1:]))
    assert sorted(asked) == sorted(types)
    y, dx, dw = results(matmul)(x, w, g)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_axes_beyond_a_matrix_are_multiplied_as_one() -> None:
    x, w, _ = drawn()
    for matmul in (None, *MATMULS):
        wanted = x.astype(np.float64) @ w if matmul is None else expected(x, w, WRITTEN[matmul][0], WRITTEN[matmul][-1])
        found = product(x.reshape(4, 6, K), w.reshape(K, 5, 8), matmul)
        np.testing.assert_allclose(found, wanted.reshape(4, 6, 5, 8), rtol=0, atol=1e-5 * np.abs(wanted).max())


@functools.cache
def likelihood_and_gradient(matmul: Matmul, loop: Any = "unroll", remat: Any = "none") -> Any:
    config = small.july2026(layer_loop=loop, remat=remat)
    batch = small.batch(2, 12, config.vocab, np.float64)
    with jax.enable_x64(True):
        objective = functools.partial(Likelihood(), Transformer(config, jnp.float64, matmul=matmul))
        loss = jax.jit(jax.value_and_grad(lambda params: objective(params, batch).total))
        return jax.tree.map(np.asarray, loss(small.parameters(config, np.float64)))


@pytest.mark.parametrize("matmul", [Int8(), Float8()], ids=str)
@pytest.mark.parametrize(("loop", "remat"), [("scan", "full"), ("unroll", "dots")])
def test_layer_loop_and_remat_change_nothing(matmul: Matmul, loop: str, remat: str) -> None:
    small.assert_close(likelihood_and_gradient(matmul, loop, remat), likelihood_and_gradient(matmul), 1e-6)


@pytest.mark.parametrize("make", [small.july2026, small.mixed, small.october2025], ids=lambda make: make.__name__)
def test_every_product_of_the_layers_is_in_eight_bits_and_no_other(make: Any) -> None:
    config = make()
    model, tokens_BT = Transformer(config, matmul=Float8()), np.zeros((1, 4), np.int32)
    text = jax.jit(lambda p: model.logits(p, model.apply(p, tokens_BT)[0])).lower(model.shapes()).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    eight = [line for line in products if line.count("f8E4M3FN") == 2]
    assert len(eight) == config.depth * (4 + (3 if "SwiGLU" in str(config.pattern[0].mlp) else 2))
    assert len(products) > len(eight), "attention and the head compute in the compute type"


@functools.cache
def gradient(mesh: str, matmul: Matmul) -> Any:
    with jax.enable_x64(True):
        state, _ = train(mesh, Transformer(divisible(), jnp.float64, matmul=matmul), keep_gradient(), 1, 1)
        return jax.tree.map(np.asarray, state.optimizer)


@pytest.mark.parametrize("matmul", [Int8(), Float8()], ids=str)
def test_a_sharded_step_gives_the_gradient_of_one_device(matmul: Matmul) -> None:
    small.assert_close(gradient("all", matmul), gradient("one", matmul), 1e-5)


def learned(matmul: Matmul, steps: int = 60) -> tuple[float, float]:
    """The first and the last loss of a short training run, on one batch."""
    config, tx = small.october2025(width=32), optax.adam(0.01)
    transformer = Transformer(config, matmul=matmul)
    batch = small.batch(4, 12, config.vocab)

    @jax.jit
    def step(params: Any, moments: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda params: Likelihood()(transformer, params, batch).total)(params)
        updates, moments = tx.update(grads, moments)
        return optax.apply_updates(params, updates), moments, loss

    params = jax.tree.map(jnp.asarray, small.parameters(config, scale=0.2))
    moments, losses = tx.init(params), []
    for _ in range(steps):
        params, moments, loss = step(params, moments)
        losses.append(float(loss / batch["weights"].sum()))
    return losses[0], losses[-1]


def test_training_reaches_the_loss_of_float32_and_without_scales_it_does_not(monkeypatch: Any) -> None:
    first, last = learned(None)
    assert first - last > 1
    bound = 0.005 * (first - last)
    for matmul in (Int8(), Float8()):
        assert abs(learned(matmul)[1] - last) < bound, matmul

    def coarse(a: jax.Array, dtype: Any, axis: int | None) -> quantized.Scaled:
        """As if there were one scale for all matrices."""
        return quantized.Scaled(jnp.round(a).astype(dtype), jnp.ones((1, 1)))

    monkeypatch.setattr(quantized, "quantize", coarse)
    assert abs(learned(Int8())[1] - last) > bound


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rl"])
@pytest.mark.parametrize(("name", "matmul"), [("dtype", None), ("int8", Int8()), ("float8", Float8())])
def test_one_word_chooses_the_products_of_pretraining_and_sft(stage: str, name: str, matmul: Matmul) -> None:
    e = experiment(f"--matmul={name}", stage=stage)
    assert e.matmul == (None if stage == "rl" else matmul)
    assert from_json(Experiment, json.loads(json.dumps(to_json(e)))) == e


def test_the_fields_of_a_type_are_set_beside_its_name() -> None:
    assert experiment("--matmul=float8", "--matmul.scaling=row").matmul == Float8("row")
    assert experiment("--matmul=int8", "--matmul.weight_gradient=True").matmul == Int8(True)
    with pytest.raises(UserError, match=r"'int4' for argument '--matmul'.*'dtype', 'int8', 'float8'"):
        experiment("--matmul=int4")


def test_rl_refuses_products_that_its_samplers_do_not_have() -> None:
    with pytest.raises(ValueError, match="leave it None in stage 'rl'"):
        dataclasses.replace(experiment(stage="rl"), matmul=Int8())


def test_a_run_does_not_go_on_with_other_products_in_silence(tmp_path: Path) -> None:
    plain = experiment()
    checkpoint.write_experiment(tmp_path, plain)
    with pytest.raises(UserError, match=r"matmul.* and is now .*give this one its own --name"):
        checkpoint.check_same(tmp_path, experiment("--matmul=int8"), RESUMABLE)
    written = {"format": FORMAT, **to_json(plain)}
    del written["matmul"]  # As versions before wrote it.
    (tmp_path / checkpoint.EXPERIMENT).write_text(json.dumps(written))
    checkpoint.check_same(tmp_path, plain, RESUMABLE)


@pytest.mark.parametrize("matmul", [Int8(), Float8()], ids=str)
def test_parameters_are_the_same_and_the_objective_alone_has_the_products(matmul: Matmul) -> None:
    plain, setup = (
        compilation.make_setup(dataclasses.replace(experiment("--depth=1"), matmul=kind), lambda _: None)
        for kind in (None, matmul)
    )
    assert setup.transformer == plain.transformer
    jax.tree.map(lambda a, b: a == b or pytest.fail(), setup.abstract, plain.abstract)

    def text(setup: compilation.Setup) -> str:
        columns = setup.experiment.objective.columns(setup.experiment.model, setup.experiment.data.row_length)
        batch = {name: jax.ShapeDtypeStruct((8, *shape), dtype) for name, (shape, dtype) in columns.items()}
        return str(jax.make_jaxpr(setup.loss)(setup.abstract.params, batch))

    eight = "i8[" if isinstance(matmul, Int8) else "f8_e4m3fn["
    assert eight in text(setup) and eight not in text(plain)
