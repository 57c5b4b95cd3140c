"""Maps parameter trees to state dicts of other projects: the name of each parameter, and its layout; reads config.json.

State dicts hold matrices like torch's Linear, (outputs, inputs); ours are (inputs, outputs), with an axis each for
heads and their channels.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxchat.errors import UserError
from jaxchat.model import Model, Transformer
from jaxchat.model.part import HUGE, TINY, Spec
from jaxchat.model.transformer import Params

Array = np.ndarray


class Place(NamedTuple):
    """Name of a parameter in a state dict, with `{}` for the layer index.

    `linear` is false for parameters that are stored as they are, such as embedding tables and scalars. `keys` are the
    keys of config.json that determine the shape, for error messages.
    """

    name: str
    linear: bool = True
    keys: str = "its keys"


Places = Mapping[tuple[str, ...], Place]  # By path: ("embed",) outside the layers, ("mixer", "q") in each layer.


class Key(NamedTuple):
    """A key of config.json: the test of its value, the valid values in words, and the value if the key is missing."""

    valid: Callable[[Any], bool]
    meaning: str
    default: Any = ...  # The key must be there.

    def or_null(self) -> "Key":
        """The same key, which may be null or missing."""
        return Key(lambda value: value is None or self.valid(value), f"{self.meaning}, or null", None)


def only(*values: Any) -> Key:
    """A key that must have one of these values; if it is missing, it has the first."""
    return Key(lambda value: value in values, " or ".join(map(json.dumps, values)), values[0])


def whole(least: int = 1, most: int = 2**31 - 1) -> Key:
    """A key that must be a whole number in this range."""
    return Key(lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}")


WHOLE = whole()
POSITIVE = Key(
    lambda value: type(value) in (int, float) and TINY <= value <= HUGE, f"a number from {TINY:.2g} to {HUGE:.2g}"
)


def read_keys(
    config: Mapping[str, Any], keys: Mapping[str, Key], place: str, neutral: frozenset[str]
) -> dict[str, Any]:
    """The values of `keys` in a JSON object, which may also have `neutral` keys; `place` names the object.

    Raises:
        UserError: a key is unknown, missing or has a value that our model does not have; the message names it.
    """
    values = {name: config.get(name, key.default) for name, key in keys.items()}
    if missing := [name for name, value in values.items() if value is ...]:
        raise UserError(f"{place} has no {missing[0]}: check that the file is complete")
    for name, key in keys.items():
        if name in config and not key.valid(config[name]):
            raise UserError(f"{place} has {name}={config[name]!r}, but jaxchat supports only {key.meaning}")
    if unknown := sorted(set(config) - set(keys) - neutral):
        name = unknown[0]
        raise UserError(
            f"{place} has {name}={config[name]!r}, which jaxchat does not know: remove {name} if the model has the "
            "same logits without it"
        )
    return values


class Family(NamedTuple):
    """A family of models in transformers: the name of its class, its model type, and how it relates to our models.

    Attributes:
        lacking: lists the features of a model that the family does not have.
        write_config: the entries of config.json that describe a model without lacking features.
        read_config: the model of a config.json, and its maximum number of positions. Raises UserError for an invalid
            one, naming a key.
        places: names and layouts of the parameters.
    """

    architecture: str
    model_type: str
    lacking: Callable[[Model], list[str]]
    write_config: Callable[[Model], dict[str, Any]]
    read_config: Callable[[Mapping[str, Any]], tuple[Model, int]]
    places: Places


def to_params(config: Model, state: Mapping[str, Array], places: Places) -> Params:
    """Converts a state dict (of weights or gradients) to our parameter tree; vocabulary padding is zero.

    Raises:
        ValueError: a parameter is missing, has a wrong shape, or is unknown to the model.
    """
    used = set()

    def take(place: Place, layer: int, shape: tuple[int, ...], spec: Spec) -> Array:
        name, linear = place.name.format(layer), place.linear
        used.add(name)
        if name not in state:
            raise ValueError(f"{name} is missing: check {place.keys}")
        value, sizes = np.asarray(state[name]), _sizes(config, shape, spec)
        stored = _matrix(sizes, spec)[::-1] if linear else sizes
        if value.shape != stored if linear else value.size != math.prod(sizes):
            raise ValueError(f"{name} has shape {value.shape}, expected {stored}: check {place.keys}")
        padded = np.zeros(shape, value.dtype)
        padded[tuple(map(slice, sizes))] = (value.T if linear else value).reshape(sizes)
        return padded

    def read(path: Any, leaf: Any, spec: Spec) -> Array:
        place, position = places[_key(path)], _position(path)
        if position is None:
            return take(place, 0, leaf.shape, spec)
        return np.stack([take(place, i, leaf.shape[1:], _own(spec)) for i in config.stacks[position]])

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
        (name, linear, _), position, value = places[_key(path)], _position(path), np.asarray(leaf)
        if position is None:
            yield name, put(value, linear, spec)
        else:
            for layer, own in zip(config.stacks[position], value, strict=True):
                yield name.format(layer), put(own, linear, _own(spec))


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
