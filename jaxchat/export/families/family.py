"""What a family of models in transformers is, and which of our models it can express."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from jaxchat.errors import UserError, first_line
from jaxchat.export.families.keys import NEUTRAL, Config, Key, read_keys
from jaxchat.export.places import Places
from jaxchat.model import Layer, Model

# Fields that matter only in training; pattern and tail are compared layer by layer.
TRAINING = tuple(
    name
    for line in (
        "pattern tail init init_scale embed_std head_std std dropout",
        "isolate_documents layer_loop remat balance_loss z_loss path",
    )
    for name in line.split()
)


class Family:
    """A family: the name of its class in transformers (none: ""), its model type, and how it relates to our models.

    Attributes:
        keys: the keys of config.json that are read; others are neutral, or the model is refused.
        parts: types of mixers, feed-forwards, norms and position encodings that it has.
        places: names and layouts of the parameters.
        dropped: regular expressions of tensors that hold nothing of the model, such as masks.
    """

    architecture: ClassVar[str] = ""
    model_type: ClassVar[str]
    keys: ClassVar[Mapping[str, Key]]
    parts: ClassVar[tuple[type, ...]]
    places: ClassVar[Places]
    dropped: ClassVar[tuple[str, ...]] = ()

    def read(self, c: Config) -> tuple[Model, int]:
        """The model and its maximum number of positions, from the values of `keys`; ValueError if they contradict."""
        raise NotImplementedError

    def write(self, model: Model, length: int) -> dict[str, Any]:
        """The entries of config.json of a model whose parts are of the family's types, with `length` positions."""
        raise NotImplementedError

    def read_config(self, config: Config) -> tuple[Model, int]:
        """The model of a config.json and its maximum number of positions; raises `UserError` naming a wrong key.

        Defaults of missing keys are those of transformers, but sizes have none.
        """
        c = read_keys(config, self.keys, "config.json", NEUTRAL)
        try:
            return self.read(c)
        except ValueError as error:
            values = ", ".join(f"{name}={c[name]!r}" for name in self.keys if name in config)
            raise UserError(f"config.json has {values}, but {error}") from None

    def foreign(self, model: Model) -> list[str]:
        """The parts of the model whose types the family does not have."""
        named = [("norm", model.norm)]
        for layer in model.layers:
            named += [("mixer", layer.mixer), ("mlp", layer.mlp), ("norm", layer.norm)]
            named += [("positions", getattr(layer.mixer, "positions", None))]
        return list(dict.fromkeys(f"{name}={type(x).__name__}" for name, x in named if type(x) not in self.parts))

    def lacking(self, model: Model) -> list[str]:
        """The features of the model that the family does not have: what config.json says reads as another model."""
        if foreign := self.foreign(model):
            return foreign
        try:
            back, _ = self.read_config(self.write(model, model.most_positions or 4096))
        except UserError as error:
            return [f"this configuration ({first_line(error)})"]
        found = list(_differences("", model, back))
        for ours, theirs in zip(model.layers, back.layers, strict=True):
            found += _differences("", ours, theirs)
        return list(dict.fromkeys(found))


def _differences(name: str, ours: Any, theirs: Any) -> Iterator[str]:
    """Fields of two configurations with other values, but for those of training."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for field in dataclasses.fields(ours):
            if field.name not in TRAINING:
                inner = f"{name}.{field.name}" if name else field.name
                yield from _differences(inner, getattr(ours, field.name), getattr(theirs, field.name))
    elif isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-9):
        return
    elif ours != theirs:
        yield f"{name}={type(ours).__name__ if dataclasses.is_dataclass(ours) else ours}"


def stacked(layers: tuple[Layer, ...]) -> dict[str, Any]:
    """`pattern` and `tail` of a model with these layers: the shortest pattern that repeats."""
    depth = len(layers)
    size = next(n for n in range(1, depth + 1) if all(layers[i] == layers[i % n] for i in range(depth)))
    return {"pattern": layers[:size], "tail": layers[depth - depth % size :]}
