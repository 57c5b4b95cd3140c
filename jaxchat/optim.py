"""The optimizer: Muon for the layers' matrices, AdamW for everything else; each parameter's Spec names its group.

After nanochat (2026): Muon with Nesterov momentum (Jordan 2024), row equilibration (MuonEq, arXiv:2603.28254), Polar
Express orthogonalisation (arXiv:2505.16932), renormalisation (Muon+, arXiv:2602.21545), factored second moments
(NorMuon, arXiv:2510.05491) and cautious decoupled weight decay (arXiv:2510.12402).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxchat import sharding
from jaxchat.model.part import Spec
from jaxchat.optimizer import AdamW, Muon, Optimizer, peak_factor

OPTIONAL = ("router", "selection_bias")
Schedule = Callable[[Any], jax.Array]  # A function of the step, which may be traced.
Sides = tuple[str | None, str, str]
Triples = tuple[tuple[float, float, float], ...]

# Five steps of degree five; safety factor 2e-2, cushion 2 (arXiv:2505.16932, section 3).
POLAR_EXPRESS: Triples = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NEWTON_SCHULZ: Triples = ((3.4445, -4.7750, 2.0315),) * 5


def learning_rate_factor(config: Optimizer, steps: int) -> Schedule:
    """Factor of every learning rate at step t: `peak_factor` times (t + 1) / warm-up, then 1, then linear down to the
    final fraction."""
    down, peak = round(config.warmdown_fraction * steps), peak_factor(config, steps)

    def factor(step: jax.Array) -> jax.Array:
        left = (steps - step) / max(down, 1)
        late = left + (1 - left) * config.final_fraction
        value = jnp.where(step <= steps - down, 1.0, late)
        early = (step + 1) / max(config.warmup_steps, 1)
        return peak * jnp.where(step < config.warmup_steps, early, value)

    return factor


def muon_momentum(config: Optimizer, steps: int) -> Schedule:
    """Muon's momentum at a step: rises in its warm-up (which takes precedence), falls during the warm-down."""
    m = config.muon or Muon()
    down = round(config.warmdown_fraction * steps)

    def momentum(step: jax.Array) -> jax.Array:
        up = jnp.minimum(step / max(m.momentum_warmup, 1), 1.0)
        late = jnp.clip((step - (steps - down)) / max(down, 1), 0.0, 1.0)
        value = m.momentum * (1 - late) + m.momentum_last * late
        return jnp.where(step < m.momentum_warmup, m.momentum_first * (1 - up) + m.momentum * up, value)

    return momentum


def muon_decay(config: Optimizer, steps: int) -> Schedule:
    """Muon's weight decay at a step: half a cosine down to zero."""
    decay = 0.0 if config.muon is None else config.muon.weight_decay
    return lambda step: decay * 0.5 * (1 + jnp.cos(math.pi * jnp.minimum(step / steps, 1.0)))


def make(config: Optimizer, specs: Any, *, steps: int, dtype: Any = jnp.float32) -> optax.GradientTransformation:
    """The optimizer of a parameter tree with the groups in `specs`; Newton-Schulz computes in `dtype`.

    Raises:
        ValueError: the configuration lacks the group of a parameter.
    """
    factor = learning_rate_factor(config, steps)

    def adamw(group: AdamW) -> optax.GradientTransformation:
        rate = lambda step: group.learning_rate * factor(step)  # noqa: E731
        return optax.adamw(rate, b1=group.b1, b2=group.b2, eps=group.eps, weight_decay=group.weight_decay)

    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    groups = {name: adamw(group) for name, group in own.items() if isinstance(group, AdamW)}
    groups["matrices"] = adamw(config.head) if config.muon is None else muon(config, specs, steps=steps, dtype=dtype)
    groups["selection_bias"] = balance(lambda step: config.selection_bias * factor(step))
    labels = jax.tree.map(lambda spec: spec.group, specs)
    used = set(jax.tree.leaves(labels))
    # A group that few models have has no state in the others, whose checkpoints are older.
    groups = {name: group for name, group in groups.items() if name in used or name not in OPTIONAL}
    if unknown := used - groups.keys():
        raise ValueError(f"unknown optimizer group {sorted(unknown)[0]!r}: add it as a field of Optimizer")
    parts = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    return optax.chain(*parts, optax.partition(groups, labels))


def balance(rate: Schedule) -> optax.GradientTransformation:
    """Steps of equal size against the sign of the gradient, less their mean over the last axis: for the selection
    biases of experts, whose gradient is by how much an expert's tokens exceed the mean (`model.experts`)."""

    def update(grads: Any, params: Any) -> Any:
        signs = jax.tree.map(jnp.sign, grads)
        return jax.tree.map(lambda s: s - jnp.mean(s, axis=-1, keepdims=True), signs)

    return optax.chain(optax.stateless(update), optax.scale_by_learning_rate(rate))


class MuonState(NamedTuple):
    """Number of steps; momentum in the parameters' shapes; mean squares over the shorter side of each matrix (stacked
    by expert first, then by layer)."""

    count: jax.Array  # type: ignore[assignment]  # Hides tuple.count, as in optax's own states.
    momentum: Any
    variance: Any


def muon(config: Optimizer, specs: Any, *, steps: int, dtype: Any) -> optax.GradientTransformation:
    """Muon for the leaves that `optax.partition` does not mask."""
    c = config.muon or Muon()
    factor, momentum, decay = (f(config, steps) for f in (learning_rate_factor, muon_momentum, muon_decay))
    triples = POLAR_EXPRESS if c.polar_express else NEWTON_SCHULZ
    views = [_View(spec) for spec in jax.tree.leaves(specs) if spec.group == "matrices"]

    def init(params: Any) -> MuonState:
        def mean_squares(view: "_View", w: jax.Array) -> jax.Array:
            N, R, C = jax.eval_shape(view.matrices, w).shape
            return jnp.zeros((N, max(R, C)), w.dtype)

        leaves, tree = jax.tree.flatten(params)
        variance = [mean_squares(view, w) for view, w in zip(views, leaves, strict=True)]
        zeros = jax.tree.map(jnp.zeros_like, params)
        return MuonState(jnp.zeros((), jnp.int32), zeros, jax.tree.unflatten(tree, variance))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        leaves, tree = jax.tree.flatten(grads)
        m = momentum(state.count)
        buffers = [b + (1 - m) * (g - b) for b, g in zip(jax.tree.leaves(state.momentum), leaves, strict=True)]
        ahead = [view.matrices(g + m * (b - g)) for view, g, b in zip(views, leaves, buffers, strict=True)]
        seconds: list[Any] = jax.tree.leaves(state.variance)
        updates: list[Any] = [None] * len(leaves)
        rate, wd = c.learning_rate * factor(state.count), decay(state.count)
        weights = jax.tree.leaves(params)
        for (shape, sides, _), members in _by_shape(views, ahead).items():
            stack = _orthogonal_stack(c, triples, [ahead[i] for i in members], sides, dtype)
            if c.variance:
                second = jnp.concatenate([seconds[i] for i in members])
                stack, second = normalise_variance(stack, second, c.b2)
            scale = rate * math.sqrt(max(1.0, shape[0] / shape[1]))
            start = 0
            for i in members:
                rows = slice(start, start + ahead[i].shape[0])
                start = rows.stop
                seconds[i] = second[rows] if c.variance else seconds[i]
                o = views[i].restore(stack[rows], weights[i].shape)
                agree = (o * weights[i] >= 0).astype(o.dtype)
                updates[i] = -scale * (o + wd * weights[i] * agree)
        state = MuonState(state.count + 1, jax.tree.unflatten(tree, buffers), jax.tree.unflatten(tree, seconds))
        return jax.tree.unflatten(tree, updates), state

    return optax.GradientTransformation(init, update)


def orthogonalise(
    x_NRC: jax.Array, triples: Sequence[tuple[float, float, float]], *, margin: float = 1.01
) -> jax.Array:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix: X <- a X + (b A + c A A) X, with A = X X^T.

    X is first divided by `margin` times its Frobenius norm, so that no singular value exceeds one.
    """
    R, C = x_NRC.shape[-2:]
    x = jnp.swapaxes(x_NRC, -1, -2) if R > C else x_NRC
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) * margin + 1e-6).astype(x.dtype)
    for a, b, c in triples:
        A = jnp.einsum("NRC,NSC->NRS", x, x)
        x = a * x + jnp.einsum("NRS,NSC->NRC", b * A + c * jnp.einsum("NRS,NST->NRT", A, A), x)
    return jnp.swapaxes(x, -1, -2) if R > C else x


def equilibrate(x_NRC: jax.Array) -> jax.Array:
    """Rescales every row to the root mean square of the row norms (arXiv:2603.28254)."""
    rows = jnp.linalg.norm(x_NRC, axis=-1, keepdims=True)
    target = jnp.linalg.norm(rows, axis=-2, keepdims=True) / math.sqrt(x_NRC.shape[-2])
    return x_NRC * (target / jnp.maximum(rows, 1e-6))


def normalise_variance(x_NRC: jax.Array, second: jax.Array, b2: float) -> tuple[jax.Array, jax.Array]:
    """NorMuon: divides by the root of a running mean square over the shorter side, keeping the Frobenius norm.

    `second` is (N, max(R, C)); square matrices average over columns. Returns the scaled matrices and new mean squares.
    """
    R, C = x_NRC.shape[-2:]
    axis = -1 if R >= C else -2
    mean = jnp.mean(jnp.square(x_NRC), axis=axis)
    second = second + (1 - b2) * (mean - second)
    step = jax.lax.rsqrt(jnp.maximum(second, 1e-10))
    before = jnp.sqrt(jnp.sum(mean, axis=-1, keepdims=True))
    after = jnp.sqrt(jnp.sum(mean * jnp.square(step), axis=-1, keepdims=True))
    least = 1e-10 / math.sqrt(x_NRC.shape[axis])
    return x_NRC * jnp.expand_dims(step * (before / jnp.maximum(after, least)), axis), second


def _orthogonal_stack(c: Muon, triples: Triples, parts: list[jax.Array], sides: Sides, dtype: Any) -> jax.Array:
    """Orthogonalises matrices of equal shape as one stack, spread over all devices; Newton-Schulz runs in `dtype`.

    Inputs and results are placed like their parameters, by the logical axes in `sides`.
    """
    stack = jnp.concatenate(parts)
    wide, count, devices = stack.dtype, stack.shape[0], sharding.device_count()
    stack = jnp.pad(stack, ((0, -count % devices), (0, 0), (0, 0)))
    for axes in (sides, ("gathered_stack", None, None), ("stack", None, None)):
        stack = sharding.constrain(stack, axes)
    if c.equilibrate:
        stack = equilibrate(stack)
    dtype = wide if wide == jnp.float64 else dtype
    margin = 1.01 if c.polar_express else 1.0
    stack = orthogonalise(stack.astype(dtype), triples, margin=margin).astype(wide)
    if c.renormalise:
        norm = jnp.linalg.norm(stack, axis=(-2, -1), keepdims=True)
        stack = stack * (math.sqrt(min(stack.shape[-2:])) / jnp.maximum(norm, 1e-6))
    stack = sharding.constrain(stack, ("gathered_stack", None, None))
    return sharding.constrain(stack, sides)[:count]


@dataclass(frozen=True)
class _View:
    """Converts a parameter, which is stacked over layers, to matrices (N, out, in) and back. N counts layers; for a
    parameter with a stack of its own, such as experts, it counts these first, because a mesh may split them."""

    spec: Spec

    @property
    def sides(self) -> Sides:
        """The first logical axis of the stack (None for layers) and of each side of a matrix: output, input."""
        axes = self.spec.axes[1:]
        return (
            (axes[0], axes[1 + self.spec.inputs], axes[1])
            if self.spec.stack
            else (None, axes[self.spec.inputs], axes[0])
        )

    def matrices(self, w: jax.Array) -> jax.Array:
        if self.spec.stack:
            w = w.swapaxes(0, 1).reshape(-1, *w.shape[2:])
        rows = math.prod(w.shape[1 : 1 + self.spec.inputs])
        return jnp.swapaxes(w.reshape(w.shape[0], rows, -1), -1, -2)

    def restore(self, x_NRC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        x_NCR = jnp.swapaxes(x_NRC, -1, -2)
        if self.spec.stack:
            return x_NCR.reshape(shape[1], shape[0], *shape[2:]).swapaxes(0, 1)
        return x_NCR.reshape(shape)


def _by_shape(views: "Sequence[_View]", stacks: list[jax.Array]) -> dict[Any, list[int]]:
    """Groups the indices of the matrices by shape and placement, the keys; a parameter of experts is a group of its
    own, because a mesh may split its stack."""
    groups: dict[Any, list[int]] = {}
    for i, (view, x_NRC) in enumerate(zip(views, stacks, strict=True)):
        own = i if view.spec.stack else None
        groups.setdefault(((x_NRC.shape[1], x_NRC.shape[2]), view.sides, own), []).append(i)
    return groups
