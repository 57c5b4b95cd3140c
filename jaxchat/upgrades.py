"""Formats of experiment.json: what a run of an earlier version is read as, one function per change of format."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxchat.errors import UserError

FORMAT = 2


def _layers(value: dict[str, Any]) -> dict[str, Any]:
    """To format 2: a layer has its own feed-forward, norm and placement; before, the model had one for all layers."""
    if "model" not in value:
        return value
    model = dict(value["model"])
    own = {"mlp": model.pop("mlp"), "norm": model["norm"], "placement": "before"}
    model["pattern"] = [{"type": "Layer", "mixer": mixer, **own} for mixer in model["pattern"]]
    return {**value, "model": model}


UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _layers}


def upgraded(value: dict[str, Any], path: Any) -> dict[str, Any]:
    """The content of an experiment.json in today's format, without its number; `UserError` for a newer one."""
    value = dict(value)
    found = value.pop("format", 1)
    if found not in (*UPGRADES, FORMAT):
        raise UserError(f"{path} has format {found}, and this version reads up to {FORMAT}: install a newer jaxchat")
    for number in range(found, FORMAT):
        value = UPGRADES[number](value)
    return value
