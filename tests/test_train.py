"""The training step and the loop: micro-batches, steps that are not finite, and the order of what `fit` does."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from configs import recipe
from jaxchat import optim
from jaxchat.errors import UserError
from jaxchat.model import Transformer
from jaxchat.objectives.likelihood import Likelihood
from jaxchat.objectives.objective import Sum
from jaxchat.train import Cadence, Hooks, Interrupted, State, fit, train_step

ZERO = jnp.zeros((), jnp.int32)


def cut(batch: dict[str, np.ndarray], micro: int) -> dict[str, np.ndarray]:
    return {name: column.reshape(micro, -1, *column.shape[1:]) for name, column in batch.items()}


def keep_gradient() -> optax.GradientTransformation:
    """Changes no parameter; its state is the gradient that it was given."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


def test_one_micro_batch_gives_the_gradient_of_eight() -> None:
    config = small.july2026(layer_loop="scan")
    batch = small.batch(8, 12, config.vocab, np.float64)
    assert len(set(batch["weights"].sum(axis=1))) == 8, "rows of equal weight would hide a mean of means"
    with jax.enable_x64(True):
        objective, tx = functools.partial(Likelihood(), Transformer(config, jnp.float64)), keep_gradient()
        params = jax.tree.map(jnp.asarray, small.parameters(config, np.float64))
        state = State(ZERO, params, tx.init(params), ZERO, ZERO)
        step = jax.jit(lambda state, batch: train_step(state, batch, loss=objective, tx=tx))
        one, eight = (step(state, cut(batch, micro)) for micro in (1, 8))
        mean = jax.jit(jax.grad(lambda p: objective(p, batch).total / batch["weights"].sum()))(params)
    small.assert_close(eight[0].optimizer, one[0].optimizer, 1e-10)
    small.assert_close(one[0].optimizer, mean, 1e-10)
    for name in ("loss", "weight", "grad_norm"):
        np.testing.assert_allclose(eight[1][name], one[1][name], rtol=1e-12)
    np.testing.assert_allclose(one[1]["weight"], batch["weights"].sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float32, 1e-5), pytest.param(jnp.bfloat16, 1e-3, marks=pytest.mark.slow)],
    ids=["f32", "bf16"],
)
def test_one_micro_batch_trains_as_eight_do(dtype: Any, tolerance: float) -> None:
    config = small.july2026(layer_loop="scan")
    transformer = Transformer(config)
    dial = recipe.Dial(depth=2, family="july2026", steps=20, batch_tokens=4096)
    tx = optim.make(recipe.optimizer(dial), transformer.specs(), steps=20, dtype=dtype)
    loss = functools.partial(Likelihood(), transformer)
    step = jax.jit(lambda state, batch: train_step(state, batch, loss=loss, tx=tx))
    losses = []
    for micro in (1, 8):
        params = jax.tree.map(jnp.asarray, small.parameters(config, scale=0.1))
        state, batch = State(ZERO, params, jax.jit(tx.init)(params), ZERO, ZERO), small.batch(8, 12, config.vocab)
        for _ in range(5):
            state, metrics = step(state, cut(batch, micro))
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[5:], losses[:5], rtol=tolerance)
    assert losses[4] < losses[0] * 0.99, "training does not change the loss"


def root(params: Any, batch: Any, key: Any) -> Sum:
    """An objective whose gradient is infinite at zero while its value is finite."""
    return Sum(jnp.sum(jnp.sqrt(jnp.abs(batch["x"] * params["w"]))), batch["weights"].sum())


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0], ids=["loss nan", "loss infinite", "gradient alone"])
def test_a_step_that_is_not_finite_changes_only_the_counters(bad: float) -> None:
    tx = optax.adam(0.1)
    params = {"w": jnp.asarray([1.0, 2.0])}
    step = jax.jit(lambda state, batch: train_step(state, batch, loss=root, tx=tx))

    def batch(value: float) -> dict[str, np.ndarray]:
        x = np.array([[[3.0, value]], [[4.0, 5.0]]], np.float32)  # the first of two micro-batches
        return {"x": x.reshape(2, 2), "weights": np.ones((2, 2), np.float32)}

    before, _ = step(State(ZERO, params, tx.init(params), ZERO, ZERO), batch(1.0))
    once, metrics = step(before, batch(bad))
    twice, _ = step(once, batch(bad))
    assert np.isfinite(metrics["loss"]) == (bad == 0.0)
    assert not np.isfinite(metrics["grad_norm"])
    for after, count in ((once, 1), (twice, 2)):
        assert (int(after.step), int(after.skipped_in_row), int(after.skipped)) == (1 + count, count, count)
        jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
        jax.tree.map(np.testing.assert_array_equal, after.optimizer, before.optimizer)
    good, metrics = step(twice, batch(2.0))
    assert (int(good.skipped_in_row), int(good.skipped), int(metrics["skipped"])) == (0, 2, 2)
    assert np.all(np.asarray(good.params["w"]) != np.asarray(before.params["w"]))


@pytest.mark.parametrize("rate", [np.inf, np.nan, 1e38])
def test_a_step_that_would_make_a_parameter_infinite_is_skipped(rate: float) -> None:
    tx = optax.sgd(rate, momentum=0.9)
    params = {"w": jnp.asarray([1.0, 2.0]), "v": jnp.asarray(0.0)}
    batch = {"x": np.full((1, 2), 300.0, np.float32), "weights": np.ones((1, 2), np.float32)}
    before = State(ZERO, params, tx.init(params), ZERO, ZERO)
    after, metrics = jax.jit(lambda state, batch: train_step(state, batch, loss=root, tx=tx))(before, batch)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert (int(after.step), int(after.skipped_in_row), int(metrics["skipped"])) == (1, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.optimizer), (before.params, before.optimizer))


def test_a_batch_of_no_weight_changes_no_gradient() -> None:
    tx, params = optax.sgd(1.0), {"w": jnp.asarray([1.0, 2.0])}
    batch = {"x": np.ones((1, 2), np.float32), "weights": np.zeros((1, 2), np.float32)}
    weighted = lambda p, b, key: Sum(jnp.sum(p["w"] * b["x"] * b["weights"]), b["weights"].sum())  # noqa: E731
    state, metrics = train_step(State(ZERO, params, tx.init(params), ZERO, ZERO), batch, loss=weighted, tx=tx)
    assert float(metrics["loss"]) == 0
    np.testing.assert_array_equal(state.params["w"], params["w"])


def test_statistics_are_added_over_micro_batches_and_divided_by_their_own_weight() -> None:
    tx, params = optax.sgd(1.0), {"w": jnp.asarray([1.0, 2.0])}
    x = np.array([[3.0, 5.0], [0.0, 0.0], [1.0, 0.0]], np.float32)  # 2, 0 and 1 tokens

    def loss(params: Any, batch: Any, key: Any) -> Sum:
        tokens = jnp.sum(batch["x"] > 0).astype(jnp.float32)
        statistics = {"seen": (jnp.sum(batch["x"]), tokens), "rows": (jnp.float32(2), jnp.float32(1))}
        return Sum(jnp.sum(params["w"] * batch["x"]), tokens, statistics)

    step = jax.jit(lambda state, batch: train_step(state, batch, loss=loss, tx=tx))
    state = State(ZERO, params, tx.init(params), ZERO, ZERO)
    for rows in ((0, 1, 2), (1,), (0,)):
        metrics = step(state, {"x": x[list(rows)]})[1]
        count = np.count_nonzero(x[list(rows)])
        np.testing.assert_allclose(metrics["seen"], x[list(rows)].sum() / max(count, 1), rtol=1e-6)
        assert metrics["rows"] == 2


def test_keys_follow_from_seed_step_and_micro_batch() -> None:
    tx, params = optax.sgd(0.0), {"w": jnp.asarray(1.0)}

    def loss(params: Any, batch: Any, key: Any) -> Sum:
        return Sum(params["w"] * jax.random.uniform(key, ()), jnp.float32(1))

    def losses(seed: int, rows: int) -> list[float]:
        step = jax.jit(lambda state, batch: train_step(state, batch, loss=loss, tx=tx, seed=seed))
        state, found = State(ZERO, params, tx.init(params), ZERO, ZERO), []
        for _ in range(3):
            state, metrics = step(state, {"x": np.ones((rows, 1), np.float32)})
            found.append(float(metrics["loss"]))
        return found

    assert losses(0, 2) == losses(0, 2)
    assert len({*losses(0, 1), *losses(0, 2), *losses(1, 1), *losses(1, 2)}) == 12


def test_a_statistic_may_not_hide_a_metric() -> None:
    tx, params = optax.sgd(1.0), {"w": jnp.asarray(1.0)}
    loss = lambda p, b, key: Sum(p["w"], jnp.float32(1), {"loss": (p["w"], jnp.float32(1))})  # noqa: E731
    with pytest.raises(ValueError, match="cannot be named 'loss'"):
        train_step(State(ZERO, params, tx.init(params), ZERO, ZERO), {"x": np.ones((1, 1))}, loss=loss, tx=tx)


class Fake(NamedTuple):
    """A run of `fit` with a step that only counts; steps up to `bad` are not finite."""

    events: list[str]
    hooks: Hooks
    bad: int

    def step(self, state: int, batch: int) -> tuple[int, dict[str, jax.Array]]:
        self.events.append(f"step {batch + 1}")
        skipped = batch + 1 if batch + 1 <= self.bad else 0
        return state + 1, {"loss": jnp.float32(batch + 1), "skipped_in_row": jnp.int32(skipped)}


def fake(stop_at: int | None = None, bad: int = 0) -> Fake:
    """A signal comes during step `stop_at`."""
    events: list[str] = []

    def log(number: int, values: dict[str, float], seconds: float) -> None:
        assert values["loss"] == number and seconds >= 0
        events.append(f"log {number}")

    hooks = Hooks(
        log=log,
        save=lambda number, state: events.append(f"save {number} of {state}"),
        evaluate=lambda number, state, last: events.append(f"evaluate {number}{' last' * last}"),
        sample=lambda number, state: events.append(f"sample {number}"),
        interrupted=lambda: f"step {stop_at}" in events,
    )
    return Fake(events, hooks, bad)


def run(fake: Fake, steps: int, cadence: Cadence, start: int = 0) -> list[str]:
    state: Any = start
    batch_at = lambda index, state: index if index == state else -1  # noqa: E731
    done = fit(state, fake.step, batch_at, start=start, steps=steps, cadence=cadence, hooks=fake.hooks)  # type: ignore
    assert done == steps
    return fake.events


def test_metrics_are_fetched_after_the_next_step_is_dispatched() -> None:
    events = run(fake(), 4, Cadence(save=0, evaluate=0, sample=0))
    assert events[:6] == ["step 1", "step 2", "log 1", "step 3", "log 2", "step 4"]
    assert events[6:] == ["log 3", "log 4", "save 4 of 4", "evaluate 4 last", "sample 4"]


def test_a_checkpoint_is_saved_before_its_evaluation() -> None:
    events = run(fake(), 6, Cadence(save=2, evaluate=3, sample=5))
    others = [event for event in events if not event.startswith(("step", "log"))]
    assert others == [
        "save 2 of 2",
        "save 3 of 3",
        "evaluate 3",
        "save 4 of 4",
        "sample 5",
        "save 6 of 6",
        "evaluate 6 last",
        "sample 6",
    ]
    assert events.index("log 3") < events.index("save 3 of 3")
    assert [event for event in events if event.startswith("log")] == [f"log {n}" for n in range(1, 7)]


def test_a_run_taken_up_again_keeps_its_cadence() -> None:
    whole, rest = (run(fake(), 6, Cadence(2, 3, 0), start=start) for start in (0, 3))
    assert rest == whole[whole.index("step 4") :]


def test_a_signal_saves_and_stops() -> None:
    stopped = fake(stop_at=3)
    with pytest.raises(Interrupted):
        run(stopped, 9, Cadence(4, 4, 4))
    assert stopped.events[-2:] == ["log 3", "save 3 of 3"]


def test_steps_that_belong_together_are_saved_and_stopped_at_together() -> None:
    stopped = fake(stop_at=4)
    with pytest.raises(Interrupted):
        run(stopped, 9, Cadence(1, 2, 0, unit=3))
    others = [event for event in stopped.events if not event.startswith(("step", "log"))]
    assert others == ["save 3 of 3", "save 6 of 6"]


def test_a_signal_during_the_last_step_lets_the_run_end() -> None:
    assert run(fake(stop_at=4), 4, Cadence(0, 0, 0))[-3:] == ["save 4 of 4", "evaluate 4 last", "sample 4"]


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run() -> None:
    broken = fake(bad=99)
    with pytest.raises(UserError, match=r"10 steps in a row up to step 10 .* under another --name"):
        run(broken, 20, Cadence(3, 3, 3))
    assert "log 10" in broken.events
    assert not any(event.startswith("save 1") for event in broken.events), "nothing is saved once it gave up"
    run(fake(bad=9), 20, Cadence(0, 0, 0))
