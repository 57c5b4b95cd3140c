"""Converts frozen dataclasses to and from JSON, and compares them. This module knows no field names."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from jaxchat.errors import UserError


def json_line(value: Any, *, ascii_only: bool = True) -> str:
    """One compact line of JSON; numbers that are not finite, which JSON cannot express, become null."""
    return json.dumps(_without_infinities(value), separators=(",", ":"), ensure_ascii=ascii_only, allow_nan=False)


def _without_infinities(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_infinities(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flags(dataclass_value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dataclass by dotted name."""
    leaves: dict[str, Any] = {}
    for name, part in _parts(dataclass_value, prefix):
        leaves |= flags(part, name + ".") if dataclasses.is_dataclass(part) else {name: part}
    return leaves


def _parts(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass by dotted name; the members of a tuple of dataclasses count as numbered fields."""
    for field in dataclasses.fields(value):
        part, name = getattr(value, field.name), prefix + field.name
        if isinstance(part, tuple) and part and dataclasses.is_dataclass(part[0]):
            yield from ((f"{name}.{i}", one) for i, one in enumerate(part))
        else:
            yield name, part


def difference(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """The leaves in which two dataclass values differ: name -> (before, after); a missing leaf is None.

    A nested dataclass that has another type, or exists in only one value, is listed with the names of its types.
    """
    old, new, old_types, new_types = flags(before), flags(after), _types(before), _types(after)
    every_type = [*old_types, *new_types]
    types = {n: (old_types.get(n), new_types.get(n)) for n in every_type if old_types.get(n) != new_types.get(n)}
    names = [*old, *(name for name in new if name not in old)]
    return types | {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _types(value: Any, prefix: str = "") -> dict[str, str]:
    """The type names of the dataclasses nested in a dataclass value, by dotted name."""
    names: dict[str, str] = {}
    for name, part in _parts(value, prefix):
        if dataclasses.is_dataclass(part):
            names |= {name: type(part).__name__, **_types(part, name + ".")}
    return names


def to_json(value: Any) -> Any:
    """Converts a dataclass to plain JSON values; stores the type's name of each, so that unions can be read back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **named}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return value


def from_json(hint: Any, value: Any, name: str = "config") -> Any:
    """Converts the output of `to_json` to type `hint`; raises `UserError` that names the first invalid field."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return from_json(typing.get_args(hint)[0], value, name)
    if origin in (typing.Union, types.UnionType):
        return _from_union(typing.get_args(hint), value, name)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise UserError(f"{name}={value!r} must be one of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{name}={value!r} is not a list")
        item = typing.get_args(hint)[0]
        return tuple(from_json(item, part, f"{name}.{i}") for i, part in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _from_object(hint, value, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise UserError(f"{name}={value!r} is not of type {hint.__name__}")
    return value


def _from_union(choices: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and type(None) in choices:
        return None
    named = {c.__name__: c for c in choices if isinstance(c, type) and dataclasses.is_dataclass(c)}
    if isinstance(value, dict) and named:
        kind = value.get("type")
        if kind not in named:
            raise UserError(f"{name} has type {kind!r}, which must be one of {', '.join(named)}")
        return from_json(named[kind], value, name)
    for choice in choices:
        if choice is not type(None) and not dataclasses.is_dataclass(choice):
            try:
                return from_json(choice, value, name)
            except UserError:
                continue
    raise UserError(f"{name}={value!r} is of none of the allowed types")


def _from_object(cls: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{name}={value!r} is not an object of {cls.__name__}")
    hints = typing.get_type_hints(cls, include_extras=True)
    unknown = [key for key in value if key != "type" and key not in hints]
    if unknown:
        raise UserError(f"{name}.{unknown[0]} is not a field of {cls.__name__}: was it written by another version?")
    fields = {key: from_json(hints[key], part, f"{name}.{key}") for key, part in value.items() if key != "type"}
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from None
