"""Upgrades experiment.json files of earlier versions, with one function per change of the format."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxchat.errors import UserError

FORMAT = 2


def _layers(value: dict[str, Any]) -> dict[str, Any]:
    """Format 1 to 2: feed-forward, norm and placement, which the model had once for all layers, move into the layer."""
    if "model" not in value:
        return value
    model = dict(value["model"])
    own = {"mlp": model.pop("mlp"), "norm": model["norm"], "placement": "before"}
    model["pattern"] = [{"type": "Layer", "mixer": mixer, **own} for mixer in model["pattern"]]
    return {**value, "model": model}


UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _layers}


def upgraded(value: dict[str, Any], path: Any) -> dict[str, Any]:
    """Converts the content of an experiment.json to the current format, without the number; `UserError` if newer."""
    value = dict(value)
    start = value.pop("format", 1)
    if start not in (*UPGRADES, FORMAT):
        raise UserError(f"{path} has format {start}, but this version reads up to {FORMAT}: install a newer jaxchat")
    for number in range(start, FORMAT):
        value = UPGRADES[number](value)
    return value
