"""The training loop of every stage: `State`, `train_step` and `fit`."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxchat import sharding
from jaxchat.errors import UserError
from jaxchat.integrity import all_finite
from jaxchat.model.transformer import Params, Transformer
from jaxchat.objectives.objective import Batch, Sum
from jaxchat.signals import Interrupted

STEP_METRICS = ("loss", "weight", "grad_norm", "skipped_in_row", "skipped")  # All others are statistics.
MOST_SKIPPED = 10  # Consecutive non-finite steps after which a run stops.


class Diverged(UserError):
    """Training was stopped after too many consecutive non-finite steps."""


class State(NamedTuple):
    """The state of training: number of steps, parameters, optimizer state, non-finite steps in a row and in total."""

    step: jax.Array
    params: Params
    optimizer: Any
    skipped_in_row: jax.Array
    skipped: jax.Array


def init_state(transformer: Transformer, tx: optax.GradientTransformation, key: jax.Array) -> State:
    """The initial state. Call it under jit with output shardings, so that it is never whole on one device."""
    params = transformer.init(key)
    zero = jnp.zeros((), jnp.int32)
    return State(zero, params, tx.init(params), zero, zero)


def state_placements(mesh: jax.sharding.Mesh, state: State, axes: Any) -> State:
    """Shardings of an abstract state: parameters by their logical `axes`, optimizer moments like their parameters."""
    placed = sharding.placements(mesh, state.params, axes)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    named = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves]
    by_shape = dict(zip(named, jax.tree.leaves(placed), strict=True))

    def like_parameter(path: Any, leaf: Any) -> Any:
        # A moment's path ends in its parameter's path: find the longest suffix that names one of the same shape.
        for start in range(len(path)):
            parameter = by_shape.get((jax.tree_util.keystr(path[start:]), leaf.shape))
            if parameter is not None:
                return parameter
        return sharding.replicated(mesh)

    optimizer = jax.tree_util.tree_map_with_path(like_parameter, state.optimizer)
    whole: Any = sharding.replicated(mesh)
    return State(whole, placed, optimizer, whole, whole)


Loss = Callable[[Params, Batch, jax.Array], Sum]


def train_step(
    state: State, batch: Batch, *, loss: Loss, tx: optax.GradientTransformation, seed: int = 0
) -> tuple[State, dict[str, jax.Array]]:
    """One update from a batch of columns (micro-batches, rows, ...); returns the new state and the step's metrics.

    Totals, weights, statistics and gradients are summed over micro-batches and divided once, gradients by the weight of
    the whole batch, so the result does not depend on the size of micro-batches. If the batch has an entry `count` (),
    only its first `count` micro-batches are computed. A micro-batch's random key is determined by the seed, the step
    and its index. A step whose loss, gradient or new parameters are not finite only changes the counters.
    """
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)
    (total, weight, statistics), grads = _summed_gradient(state.params, batch, loss, step_key)
    inverse = 1 / jnp.maximum(weight, 1e-9)
    grads = jax.tree.map(lambda g: g * inverse, grads)
    mean, norm = total * inverse, optax.tree.norm(grads)
    updates, optimizer = tx.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    finite = jnp.isfinite(mean) & jnp.isfinite(norm) & all_finite(params)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    bad = jnp.where(finite, 0, 1)
    after = State(
        state.step + 1,
        jax.tree.map(keep, params, state.params),
        jax.tree.map(keep, optimizer, state.optimizer),
        (state.skipped_in_row + 1) * bad,
        state.skipped + bad,
    )
    metrics = {
        "loss": mean,
        "weight": weight,
        "grad_norm": norm,
        "skipped_in_row": after.skipped_in_row,
        "skipped": after.skipped,
    }
    for name, (value, weight) in statistics.items():
        if name in metrics:
            raise ValueError(f"a statistic cannot be named {name!r}: every step has a metric of that name")
        metrics[name] = value / jnp.maximum(weight, 1e-9)
    return after, metrics


def _summed_gradient(params: Params, batch: Batch, loss: Loss, step_key: jax.Array) -> tuple[Sum, Params]:
    """The loss and its gradient, summed over the micro-batches of a batch."""
    columns = {name: column for name, column in batch.items() if name != "count"}
    at = lambda i: {name: column[i] for name, column in columns.items()}  # noqa: E731

    def gradient(i: Any, columns: Batch) -> tuple[Sum, Params]:
        def total(params: Params) -> tuple[jax.Array, Sum]:
            result = loss(params, columns, jax.random.fold_in(step_key, i))
            return result.total, result

        (_, result), grads = jax.value_and_grad(total, has_aux=True)(params)
        return result, grads

    def add(carry: Any, micro_batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, gradient(*micro_batch)), None

    micro_batches = next(iter(columns.values())).shape[0]
    if "count" not in batch and micro_batches == 1:
        return gradient(0, at(0))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, 0, at(0)))
    if "count" in batch:
        return jax.lax.fori_loop(0, batch["count"], lambda i, carry: add(carry, (i, at(i)))[0], zero)
    sums, _ = jax.lax.scan(add, zero, (jnp.arange(micro_batches), columns))
    return sums


class Hooks(NamedTuple):
    """Callbacks of `fit`. `log` gets (step, metrics, seconds); `evaluate` also gets whether it is the last step."""

    log: Callable[[int, dict[str, float], float], None]
    save: Callable[[int, State], None]
    evaluate: Callable[[int, State, bool], None]
    sample: Callable[[int, State], None]
    interrupted: Callable[[], bool]
    snapshot: Callable[[int, State], None] = lambda number, state: None


class Cadence(NamedTuple):
    """Steps between events; 0 means only after the last step. A run can save or stop only at multiples of `unit`."""

    save: int
    evaluate: int
    sample: int
    unit: int = 1
    snapshot: int = 0


def fit(
    state: State,
    step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]],
    batch_at: Callable[[int, State], Any],
    *,
    start: int,
    steps: int,
    cadence: Cadence,
    hooks: Hooks,
) -> State:
    """Trains from step `start` to `steps` and returns the last state. A batch may depend on the state before its step.

    A step's metrics are fetched after the next step is dispatched, so the device never waits. A checkpoint is saved
    before an evaluation starts. Raises `Interrupted` after saving if `hooks.interrupted()`, and `Diverged`, without
    saving, after MOST_SKIPPED non-finite steps in a row.
    """
    waiting: tuple[int, dict[str, jax.Array]] | None = None
    clock = time.perf_counter()

    def flush() -> None:
        nonlocal waiting, clock
        if waiting is None:
            return
        number, metrics = waiting
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        hooks.log(number, values, now - clock)
        waiting, clock = None, now
        if values["skipped_in_row"] >= MOST_SKIPPED:
            raise Diverged(
                f"{MOST_SKIPPED} steps in a row up to step {number} were not finite, and resuming would repeat them: "
                "train with lower learning rates or another --seed under another --name (this run's checkpoints stay)"
            )

    def due_at(number: int, every: int) -> bool:
        return number == steps or (every > 0 and number % every == 0)

    for index in range(start, steps):
        number, last = index + 1, index + 1 == steps
        state, metrics = step(state, batch_at(index, state))
        flush()
        waiting = (number, metrics)
        if number % cadence.unit and not last:
            continue
        due = {name: due_at(number, getattr(cadence, name)) for name in ("save", "evaluate", "sample", "snapshot")}
        stop = not last and hooks.interrupted()
        if stop or any(due.values()):
            flush()
            if due["save"] or due["evaluate"] or stop:
                hooks.save(number, state)
            if due["snapshot"]:
                hooks.snapshot(number, state)
            if stop:
                raise Interrupted("saved")
            if due["evaluate"]:
                hooks.evaluate(number, state, last)
            if due["sample"]:
                hooks.sample(number, state)
            clock = time.perf_counter()
    return state
