"""Upgrades experiment.json files of earlier versions, with one function per change of the format."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxchat.errors import UserError

FORMAT = 3


def _layers(value: dict[str, Any]) -> dict[str, Any]:
    """Format 1 to 2: feed-forward, norm and placement, which the model had once for all layers, move into the layer."""
    if "model" not in value:
        return value
    model = dict(value["model"])
    own = {"mlp": model.pop("mlp"), "norm": model["norm"], "placement": "before"}
    model["pattern"] = [{"type": "Layer", "mixer": mixer, **own} for mixer in model["pattern"]]
    return {**value, "model": model}


def _positions(value: dict[str, Any]) -> dict[str, Any]:
    """Format 2 to 3: a mixer's field `rope` is now `positions`, which may be another encoding."""
    if "model" not in value:
        return value
    pattern = [{**layer, "mixer": dict(layer["mixer"])} for layer in value["model"]["pattern"]]
    for layer in pattern:
        layer["mixer"]["positions"] = layer["mixer"].pop("rope")
    return {**value, "model": {**value["model"], "pattern": pattern}}


UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _layers, 2: _positions}


def upgraded(value: dict[str, Any], path: Any) -> dict[str, Any]:
    """Converts the content of an experiment.json to the current format, without the number; `UserError` if newer."""
    value = dict(value)
    start = value.pop("format", 1)
    if start not in (*UPGRADES, FORMAT):
        raise UserError(f"{path} has format {start}, but this version reads up to {FORMAT}: install a newer jaxchat")
    for number in range(start, FORMAT):
        value = UPGRADES[number](value)
    return value
