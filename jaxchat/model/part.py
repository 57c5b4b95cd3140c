"""The interface of the model's parts: mixers, feed-forwards and norms.

A part is a frozen configuration and a Flax module that computes it; the tables `MIXERS`, `MLPS` and `NORMS` map one to
the other. A module has two fields, its `config` and the `static` facts that all parts share. It creates its parameters
with `param` (shape, logical axes, initializer, optimizer group) and uses no mutable collections.

    mixer         (x_BTM, context, cache) -> (y_BTM, cache, Aux)
                  static methods that take the configuration: `empty` (a cache), `share` (values that equal layers
                  compute once), `kernel` (the shapes of its attention call, or None), `keeps_all` and `rewinds`
                  (what its cache allows, see `GroupedQueryAttention`), `matmul_parameters` (number of parameters in
                  matrix products, for FLOPs), `attention_flops` (training FLOPs per token at a row length)
    feed-forward  (x_BTM, context) -> (y_BTM, Aux); static method `matmul_parameters` (of those that a token uses), and
                  `unused_parameters` if a token does not use all
    norm          (x) -> y, over the last axes, whose logical names are its field `axes` (by default the width)

A part scales its own losses. A call with a cache may have padding at position -1, which must leave the cache as it was.

A mixer's cache is a NamedTuple of arrays whose first axis is the batch. It has a property `axes` (the same tree with
tuples of logical axes) and a method `resize(length_B, like)` (copies the rows into arrays with the shapes of `like`).
A mixer that needs positions has a field `positions`, which `POSITIONS` maps to a module in the same way.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxchat.model.quantized import Matmul

Weighted = tuple[jax.Array, jax.Array]  # A total and its weight; their ratio is a mean.

# Sizes of float32, in which parameters are stored. Smaller numbers are 0 on most devices.
TINY, HUGE = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).max)


class Static(NamedTuple):
    """Facts that are fixed when a program is compiled and the same for every part.

    `vocab` is the padded vocabulary. `attention` names the backend in `kernels.BACKENDS` for calls without a cache,
    `decoding` the one in `decoding_kernels.DECODING` for calls with a cache. `matmul` is the number format of the large
    matrix products, None for the compute type.
    """

    width: int
    vocab: int
    attention: str = "xla"
    decoding: str = "xla"
    matmul: Matmul = None


class Context(NamedTuple):
    """Inputs of a part besides x: token ids, positions and segments, each (B, T); segments may be None.

    `shared` holds values that equal layers compute once, such as the cosines of rotary positions. `length_B` is the
    number of positions written in each row after this call, None without a cache. `key` is this part's random key in
    training (for dropout), None otherwise.
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array | None
    shared: Mapping[Any, Any] = {}
    length_B: jax.Array | None = None
    key: jax.Array | None = None


class Aux(NamedTuple):
    """Additional results of a part by name: losses to minimise and statistics to log.

    Each is a pair of a total and its weight; pairs of equal name are summed over the layers.
    """

    losses: Mapping[str, Weighted] = {}
    statistics: Mapping[str, Weighted] = {}


class Attends(NamedTuple):
    """Shapes of a mixer's attention call, with which a kernel is tested on the device.

    `dense` names what only dense products can do of the call, as the rest of a sentence after "cannot"; `dropout` is
    true if training drops weights, which also only they can do.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    dense: str = ""
    dropout: bool = False


def add_aux(parts: "list[Aux]") -> Aux:
    """The sum of totals and weights, by name."""
    sums: tuple[dict[str, Weighted], dict[str, Weighted]] = ({}, {})
    for part in parts:
        for total, values in zip(sums, part):
            for name, value in values.items():
                total[name] = jax.tree.map(jnp.add, total[name], value) if name in total else value
    return Aux(*sums)


@dataclass(frozen=True)
class Spec:
    """Metadata of a parameter, a leaf in trees: logical axes, optimizer group, and for Muon the number of leading axes
    that form the input side of its matrix. With `stack` the first axis numbers matrices, such as experts. `exact`:
    decoding keeps it in float32."""

    axes: tuple[str, ...]
    group: str
    inputs: int = 1
    stack: bool = False
    exact: bool = False


@flax.struct.dataclass
class Boxed:
    """A parameter with its Spec, as `init` returns it."""

    value: Any
    spec: Spec = flax.struct.field(pytree_node=False)


def param(
    module: nn.Module,
    name: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    init: Callable[..., jax.Array],
    *,
    group: str,
    inputs: int = 1,
    stack: bool = False,
    exact: bool = False,
) -> jax.Array:
    """Creates a float32 parameter with its logical `axes` (a row of `sharding.TRAIN_RULES` each) and optimizer `group`.

    Muon orthogonalises a parameter of the group "matrices" as one matrix, whose input side is the first `inputs` axes;
    with `stack`, as one for each index of the first axis.
    """
    if group == "matrices" and not 0 < inputs < len(axes) - stack:
        raise ValueError(f"parameter {name} with axes {axes} is not a matrix: it needs another optimizer group")
    if len(axes) != len(shape):
        raise ValueError(f"parameter {name} has {len(axes)} logical axes but {len(shape)} dimensions")
    spec = Spec(axes, group, inputs, stack, exact)
    value: Any = module.param(name, lambda key: Boxed(init(key, shape, jnp.float32), spec))
    return value.value if is_boxed(value) else value


def is_boxed(x: Any) -> bool:
    return isinstance(x, Boxed)


def stacked(box: Boxed) -> Boxed:
    """Adds the logical axis `layers` to a parameter that was stacked over the repeats of the pattern."""
    return Boxed(box.value, dataclasses.replace(box.spec, axes=("layers", *box.spec.axes)))
