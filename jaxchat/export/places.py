"""Maps parameter trees to state dicts of other projects: the name of each parameter, and its layout.

State dicts hold matrices like torch's Linear, (outputs, inputs); ours are (inputs, outputs), with an axis each for
heads and their channels.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxchat.model import Model, Transformer
from jaxchat.model.part import Spec
from jaxchat.model.transformer import Params

Array = np.ndarray


class Place(NamedTuple):
    """Name of a parameter in a state dict, with `{}` for the layer index.

    `linear` is false for parameters that are stored as they are, such as embedding tables and scalars.
    """

    name: str
    linear: bool = True


Places = Mapping[tuple[str, ...], Place]  # By path: ("embed",) outside the layers, ("mixer", "q") in each layer.


class Family(NamedTuple):
    """A family of models in transformers: the name of its class, its model type, and how it relates to our models.

    Attributes:
        lacking: lists the features of a model that the family does not have.
        write_config: the entries of config.json that describe a model without lacking features.
        read_config: the model of a config.json. May raise KeyError, TypeError or ValueError for an invalid one, and
            UserError for a setting that we do not have.
        places: names and layouts of the parameters.
    """

    architecture: str
    model_type: str
    lacking: Callable[[Model], list[str]]
    write_config: Callable[[Model], dict[str, Any]]
    read_config: Callable[[Mapping[str, Any]], Model]
    places: Places


def to_params(config: Model, state: Mapping[str, Array], places: Places) -> Params:
    """Converts a state dict (of weights or gradients) to our parameter tree; vocabulary padding is zero.

    Raises:
        ValueError: a parameter is missing, has a wrong shape, or is unknown to the model.
    """
    used = set()

    def take(name: str, linear: bool, shape: tuple[int, ...], spec: Spec) -> Array:
        used.add(name)
        if name not in state:
            raise ValueError(f"{name} is missing")
        value, sizes = np.asarray(state[name]), _sizes(config, shape, spec)
        stored = _matrix(sizes, spec)[::-1] if linear else sizes
        if value.shape != stored if linear else value.size != math.prod(sizes):
            raise ValueError(f"{name} has shape {value.shape}, expected {stored}")
        padded = np.zeros(shape, value.dtype)
        padded[tuple(map(slice, sizes))] = (value.T if linear else value).reshape(sizes)
        return padded

    def read(path: Any, leaf: Any, spec: Spec) -> Array:
        place, position = places[_key(path)], _position(path)
        if position is None:
            return take(*place, leaf.shape, spec)
        layers = range(position, config.depth, len(config.pattern))
        return np.stack([take(place.name.format(i), place.linear, leaf.shape[1:], _own(spec)) for i in layers])

    transformer = Transformer(config)
    params: Params = jax.tree_util.tree_map_with_path(read, transformer.shapes(), transformer.specs())
    if left := sorted(set(state) - used):
        others = f" and {len(left) - 1} more" * (left[1:] != [])
        raise ValueError(f"unexpected parameters: {left[0]}{others}")
    return params


def to_state(config: Model, params: Params, places: Places) -> Iterator[tuple[str, Array]]:
    """Yields the entries of a state dict, without vocabulary padding."""

    def put(value: Array, linear: bool, spec: Spec) -> Array:
        sizes = _sizes(config, value.shape, spec)
        value = value[tuple(map(slice, sizes))]
        return value.reshape(_matrix(sizes, spec)).T if linear else value

    specs = jax.tree.leaves(Transformer(config).specs())
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), specs, strict=True):
        (name, linear), position, value = places[_key(path)], _position(path), np.asarray(leaf)
        if position is None:
            yield name, put(value, linear, spec)
        else:
            for repeat, own in enumerate(value):
                yield name.format(position + repeat * len(config.pattern)), put(own, linear, _own(spec))


def _key(path: Any) -> tuple[str, ...]:
    """The names in a path of the parameter tree, after "ends" or "layers" and the position in the pattern."""
    return tuple(step.key for step in path[1:] if hasattr(step, "key"))


def _position(path: Any) -> int | None:
    """The position in the pattern of a layer's parameter; None outside the layers."""
    return path[1].idx if path[0].key == "layers" else None


def _own(spec: Spec) -> Spec:
    """The Spec of one layer's parameter, without the stack axis."""
    return dataclasses.replace(spec, axes=spec.axes[1:])


def _sizes(config: Model, shape: tuple[int, ...], spec: Spec) -> tuple[int, ...]:
    """A shape without vocabulary padding."""
    return tuple(config.vocab if axis in ("vocab", "tokens") else size for axis, size in zip(spec.axes, shape))


def _matrix(sizes: tuple[int, ...], spec: Spec) -> tuple[int, int]:
    """The two sides of a matrix: inputs, outputs."""
    return math.prod(sizes[: spec.inputs]), math.prod(sizes[spec.inputs :])
