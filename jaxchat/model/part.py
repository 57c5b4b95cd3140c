"""What a part of the model is, and what it is given.

A part is a frozen configuration and a Flax module that computes it; a table maps one to the other: `MIXERS`, `MLPS`,
`NORMS`. A module has two fields, its `config` and the `static` facts that all parts share, creates its parameters with
`param` (shape, logical axes, initial value, optimizer group), and returns values only: no mutable collections.

    mixer         (x_BTM, context, cache) -> (y_BTM, cache, Aux)
                  static methods, of the configuration: `empty` (a cache), `share` (what equal layers compute once),
                  `kernel` (None, or how it calls an attention kernel), `keeps_all`, `matmul_parameters`,
                  `attention_flops`
    feed-forward  (x_BTM, context) -> (y_BTM, Aux); static method `matmul_parameters`
    norm          (x) -> y, over the last axis

A mixer's cache is a NamedTuple of arrays whose first axis is the batch, with a property `axes` (logical axes, the same
tree with tuples of names) and a method `resize(length_B, like)` (the same rows in arrays of the shapes of `like`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat.model.quantized import Matmul

Weighted = tuple[jax.Array, jax.Array]  # A total and its weight; their ratio is a mean.


class Static(NamedTuple):
    """Facts that are fixed when a program is compiled and the same for every part.

    `vocab` is the padded vocabulary. `attention` names the row of `kernels.BACKENDS` for calls without a cache,
    `decoding` that of `decoding_kernels.DECODING` for calls with one. `matmul` is the number format of the large matrix
    products, None for the compute type.
    """

    width: int
    vocab: int
    attention: str = "xla"
    decoding: str = "xla"
    matmul: Matmul = None


class Context(NamedTuple):
    """Per-token inputs of a part beside x: token ids, positions and segments, each (B, T); segments may be None.

    `shared` holds what equal parts of all layers compute once, such as the cosines of rotary positions. `length_B`,
    only with a cache, is the number of positions of each row that are written after this call. `key` is a random key of
    this layer in training (for dropout), None otherwise.
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array | None
    shared: Mapping[Any, Any] = {}
    length_B: jax.Array | None = None
    key: jax.Array | None = None


class Aux(NamedTuple):
    """What a part returns beside its output, by name: losses to be minimised and statistics to be logged.

    Each is a total with its weight. Those of all layers are added by name.
    """

    losses: Mapping[str, Weighted] = {}
    statistics: Mapping[str, Weighted] = {}


class Attends(NamedTuple):
    """The shapes with which a mixer calls an attention kernel, so that the kernel can be tested on the device."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None


def add_aux(parts: "list[Aux]") -> Aux:
    """The sum of totals and weights, by name."""
    sums: tuple[dict[str, Weighted], dict[str, Weighted]] = ({}, {})
    for part in parts:
        for found, values in zip(sums, part):
            for name, value in values.items():
                found[name] = jax.tree.map(jnp.add, found[name], value) if name in found else value
    return Aux(*sums)


class Spec(NamedTuple):
    """What is known of a parameter beside its shape: logical axes, optimizer group, and how many of the axes (from the
    first) are the input side of a matrix, for Muon."""

    axes: tuple[str, ...]
    group: str
    inputs: int = 1


@flax.struct.dataclass
class Boxed(nn.meta.AxisMetadata[Any]):
    """A parameter with its Spec, as `init` returns it."""

    value: Any
    spec: Spec = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Boxed":
        return Boxed(val, self.spec)

    def add_axis(self, index: int, params: Any) -> "Boxed":
        return self

    def remove_axis(self, index: int, params: Any) -> "Boxed":
        return self


def param(
    module: nn.Module,
    name: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    init: Callable[..., jax.Array],
    *,
    group: str = "matrices",
    inputs: int = 1,
) -> jax.Array:
    """A float32 parameter. Sharding reads its logical `axes`; `group` is a field of the optimizer's configuration."""
    if len(axes) != len(shape):
        raise ValueError(f"parameter {name} has {len(axes)} axes and {len(shape)} dimensions")
    spec = Spec(axes, group, inputs)
    value: Any = module.param(name, lambda key: Boxed(init(key, shape, jnp.float32), spec))
    return value


def is_boxed(x: Any) -> bool:
    return isinstance(x, Boxed)


def stacked(box: Boxed) -> Boxed:
    """A parameter that was stacked over the repeats of the pattern."""
    spec = box.spec._replace(axes=("layers", *box.spec.axes))
    return Boxed(box.value, spec)
