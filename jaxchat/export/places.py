"""Maps parameter trees to state dicts of other projects: the name of each tensor, its layout, and what it joins.

State dicts hold matrices like torch's Linear, (outputs, inputs); ours are (inputs, outputs), with an axis each for
heads and their channels, and stacked by layer and expert.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxchat.model import Model, Transformer
from jaxchat.model.part import Spec
from jaxchat.model.transformer import Params

Array = np.ndarray


class Place(NamedTuple):
    """Name of the tensor that has a parameter, with `{}` for the index of the layer, and then of the expert.

    Attributes:
        linear: a matrix is stored as (outputs, inputs). False for what is stored as it is, such as embedding tables
            and scalars, and for matrices stored as (inputs, outputs).
        keys: the keys of config.json that determine the shape, for error messages.
        joined: how the parameters of a tensor that has several follow each other, in the order of the places: "whole",
            or within each head.
    """

    name: str
    linear: bool = True
    keys: str = "its keys"
    joined: Literal["whole", "heads"] = "whole"


# By path: ("embed",) outside the layers, ("mixer", "q") in each layer, ("experts", "in") for each expert.
Places = Mapping[tuple[str, ...], Place]


class Part(NamedTuple):
    """A parameter of one layer and expert as a view of the tree without vocabulary padding."""

    view: Array
    place: Place
    spec: Spec

    def matrix(self, value: Array) -> Array:
        """A view of `value`, of this part's shape, with the last axis that parts are joined along, and inputs first."""
        if "matrices" not in self.kind:
            return value.reshape(len(value), -1) if self.kind == "table" else value.reshape(-1)
        inputs, last = math.prod(value.shape[: self.spec.inputs]), value.shape[-1]
        return value.reshape((inputs, -1, last) if self.place.joined == "heads" else (inputs, -1))

    @property
    def kind(self) -> str:
        """matrices, table (an embedding), or vector, in which any shape of as many numbers is the same."""
        if self.spec.group in ("matrices", "head", "router") and self.view.ndim > 1:
            return "matrices"
        return "table" if self.view.ndim > 1 and self.spec.group != "scalars" else "vector"


class State(Mapping[str, Array]):
    """The tensors of a state dict that are made of a parameter tree, or that it is made of, each when it is asked for.

    With a `dtype`, floats are cast to it, except those that routing needs in float32.
    """

    def __init__(self, config: Model, params: Params, places: Places, dtype: Any = None) -> None:
        self._parts: dict[str, list[Part]] = {}
        self._dtype, order = dtype, {key: index for index, key in enumerate(places)}
        found = []
        leaves, specs = jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(_described(config)[1])
        for (path, leaf), spec in zip(leaves, specs, strict=True):
            key = _key(path, spec)
            layers = config.stacks[path[1].idx] if path[0].key == "layers" else None
            found.append((order[key], places[key], layers, leaf, spec))
        for _, place, layers, leaf, spec in sorted(found, key=lambda one: one[0]):
            for name, view in _views(place.name, layers, np.asarray(leaf), spec):
                sizes = (config.vocab if axis in ("vocab", "tokens") else size for axis, size in _axes(view, spec))
                index: Any = (*(slice(size) for size in sizes), ...)
                view = view[index]
                self._parts.setdefault(name, []).append(Part(view, place, spec))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def keys_of(self, name: str) -> str:
        """The keys of config.json that determine the shape of a tensor."""
        return self._parts[name][0].place.keys

    def __getitem__(self, name: str) -> Array:
        parts = self._parts[name]
        pieces = [part.matrix(part.view) for part in parts]
        value = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
        value = value.reshape(len(value), -1) if parts[0].kind == "matrices" else value
        value = value.T if parts[0].kind == "matrices" and parts[0].place.linear else value
        return value if self._dtype is None or parts[0].spec.exact else value.astype(self._dtype, copy=False)

    def put(self, name: str, value: Array) -> None:
        """Copies a tensor into the parameters that it has; raises ValueError if its shape is another."""
        parts = self._parts[name]
        place, wanted = parts[0].place, self._shape(parts)
        if value.shape != wanted and (parts[0].kind != "vector" or value.size != math.prod(wanted)):
            raise ValueError(f"{name} has shape {value.shape}, expected {wanted}: check {place.keys}")
        if parts[0].kind == "matrices":
            value = value.T if place.linear else value
        elif parts[0].kind == "vector":
            value = value.reshape(-1)
        start = 0
        if place.joined == "heads":
            value = value.reshape(len(value), *parts[0].matrix(parts[0].view).shape[1:-1], -1)
        for part in parts:
            size = part.matrix(part.view).shape[-1]
            part.view[...] = value[..., start : start + size].reshape(part.view.shape)
            start += size

    def _shape(self, parts: list[Part]) -> tuple[int, ...]:
        """Shape of a tensor in the state dict."""
        total = sum(part.view.size for part in parts)
        if parts[0].kind == "vector":
            return (total,)
        first = len(parts[0].matrix(parts[0].view))
        shape = (first, total // first)
        return shape[::-1] if parts[0].kind == "matrices" and parts[0].place.linear else shape


def to_params(config: Model, state: Mapping[str, Array], places: Places, dtype: Any = None) -> Params:
    """Converts a state dict (of weights or gradients), tensor by tensor, to our parameter tree.

    Vocabulary padding is zero. The parameters are of `dtype`, except those that routing needs in float32; without it
    of the type of the first tensor.

    Raises:
        ValueError: a parameter is missing, has a wrong shape, or is unknown to the model.
    """
    names = sorted(state)
    dtype = state[names[0]].dtype if dtype is None and names else dtype

    def empty(leaf: Any, spec: Spec) -> Array:
        return aligned(leaf.shape, np.dtype(np.float32 if spec.exact and np.dtype(dtype).itemsize < 4 else dtype))

    params: Params = jax.tree.map(empty, *_described(config))
    wanted = State(config, params, places)
    if missing := [name for name in wanted if name not in state]:
        raise ValueError(f"{missing[0]} is missing: check {wanted.keys_of(missing[0])}")
    if left := sorted(set(names) - set(wanted)):
        others = f" and {len(left) - 1} more" * (left[1:] != [])
        raise ValueError(f"unexpected parameters: {left[0]}{others}")
    for name in wanted:
        wanted.put(name, np.asarray(state[name]))
    return params


@functools.lru_cache(8)
def _described(config: Model) -> tuple[Any, Any]:
    """Shapes and specs of a model's parameters."""
    transformer = Transformer(config)
    return transformer.shapes(), transformer.specs()


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros at an address that `jax.device_put(..., may_alias=True)` can use without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _key(path: Any, spec: Spec) -> tuple[str, ...]:
    """The names in a path of the parameter tree, after "ends" or "layers" and the position in the pattern."""
    names = tuple(step.key for step in path[1:] if hasattr(step, "key"))
    return ("experts", *names[1:]) if spec.stack else names


def _views(name: str, layers: range | None, leaf: Array, spec: Spec) -> Iterator[tuple[str, Array]]:
    """Name and view of a parameter for each layer, and for each expert if it is of experts."""
    for at, layer in [((), ())] if layers is None else [((i,), (layer,)) for i, layer in enumerate(layers)]:
        own = leaf[(*at, ...)]
        if spec.stack:
            yield from ((name.format(*layer, expert), view) for expert, view in enumerate(own))
        else:
            yield name.format(*layer), own


def _axes(view: Array, spec: Spec) -> list[tuple[str, int]]:
    """Logical names and sizes of the axes of a view, which lacks the first axes of the parameter."""
    return list(zip(spec.axes[len(spec.axes) - view.ndim :], view.shape, strict=True))
