"""What a user's own training data replace in a configuration."""

from typing import Any


def replaced(own: tuple[str, ...], train: tuple[str, ...], fields: dict[str, object]) -> dict[str, tuple[Any, ...]]:
    """Fields of Data that `own` training data replace; removes `prompts`, which are about other data, from `fields`."""
    if not own:
        return {}
    parts: dict[str, tuple[Any, ...]] = {"train": own}
    if len(own) != len(train):
        parts["epochs"] = ()
    if not {_data_set(spec) for spec in own} <= {_data_set(spec) for spec in train}:
        fields.pop("prompts", None)
        parts |= {"val": (), "epochs": ()}
    return parts


def _data_set(spec: str) -> str:
    """The generator or the hub's data set of a spec; a file is its own."""
    kind, colon, rest = spec.removeprefix("text:").partition(":")
    return kind if kind == "tinyworld" else f"hub:{rest.partition(':')[0]}" if kind == "hub" and colon else spec
