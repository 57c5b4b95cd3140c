"""Encodes Python literals as JSON, and sends them as messages through pipes.

JSON has no tuples, sets, bytes, complex numbers or non-string keys, so these are encoded as [type, content], as are
lists. Integers beyond 63 bits are encoded in hexadecimal, which is parsed in linear time.
"""

import json
import os
import struct
from typing import Any

DEPTH = 64
_CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_HEADER = struct.Struct(">I")


class NotLiteral(ValueError):
    """A value to encode or a received message that is not a literal."""


def encode(value: Any, depth: int = DEPTH) -> Any:
    """Encodes a literal as a JSON value. Instances of subclasses, such as Counter, are encoded as their base type.

    Raises:
        NotLiteral: the value contains a generator or other object, or is nested deeper than `depth`.
    """
    if depth < 0:
        raise NotLiteral("nested too deeply")
    if value is None or value is True or value is False:
        return value
    inner = depth - 1
    match value:
        case int():
            number = int(value)
            return number if abs(number) < 1 << 63 else ["int", hex(number)]
        case float():
            return float(value)
        case str():
            return str.__str__(value)
        case complex():
            return ["complex", [value.real, value.imag]]
        case bytes():
            return ["bytes", value.hex()]
        case list() | tuple() | set() | frozenset():
            kind = next(name for name, kind in _CONTAINERS.items() if isinstance(value, kind))
            return [kind, [encode(part, inner) for part in value]]
        case dict():
            return ["dict", [[encode(key, inner), encode(part, inner)] for key, part in dict.items(value)]]
    raise NotLiteral(f"a {type(value).__name__} is not a literal")


def decode(value: Any, depth: int = DEPTH) -> Any:
    """Decodes a value from `encode`; the result has only built-in types.

    Raises:
        NotLiteral: `value` is not an encoded literal.
    """
    if depth < 0:
        raise NotLiteral("nested too deeply")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    inner = depth - 1
    try:
        match value:
            case ["int", str(digits)]:
                return int(digits, 16)
            case ["complex", [int() | float() as real, int() | float() as imaginary]]:
                return complex(real, imaginary)
            case ["bytes", str(digits)]:
                return bytes.fromhex(digits)
            case ["list" | "tuple" | "set" | "frozenset" as kind, list(parts)]:
                return _CONTAINERS[kind](decode(part, inner) for part in parts)
            case ["dict", list(parts)]:
                return {decode(key, inner): decode(part, inner) for key, part in parts}
    except (TypeError, ValueError, OverflowError) as error:  # For example a list as a key, or invalid digits.
        raise NotLiteral(str(error)) from None
    raise NotLiteral("not an encoded literal")


def send(pipe: int, message: Any) -> None:
    """Writes one message: its length as a big-endian 32-bit integer, then JSON in ASCII."""
    text = json.dumps(message).encode("ascii")
    rest = memoryview(_HEADER.pack(len(text)) + text)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def receive(pipe: int, limit: int) -> Any:
    """Reads one message.

    Raises:
        EOFError: the other process closed the pipe.
        NotLiteral: the message is longer than `limit` bytes or not JSON.
    """
    (size,) = _HEADER.unpack(_read(pipe, _HEADER.size))
    if size > limit:
        raise NotLiteral(f"a message of {size} bytes is longer than the limit of {limit}")
    try:
        return json.loads(_read(pipe, size).decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise NotLiteral(f"not JSON: {error}") from None


def _read(pipe: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(pipe, min(size, 1 << 16))
        if not part:
            raise EOFError("the other process closed the pipe")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
