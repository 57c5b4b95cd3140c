"""Plain values as JSON and back, and messages of them through pipes.

JSON has no tuple, set, bytes, complex number or key that is no text: such values are written as [type, content], and
so are lists. Whole numbers beyond 63 bits are written in hexadecimal, whose reading takes time linear in the digits.
"""

import json
import os
import struct
from typing import Any

DEPTH = 64
_HEADER = struct.Struct(">I")


class NotLiteral(ValueError):
    """A value, or a text from the other side, that is no literal."""


def encode(value: Any, depth: int = DEPTH) -> Any:
    """What JSON can say of a value. An object of a class made from a literal's, such as a Counter, is its content.

    Raises:
        NotLiteral: something else, such as a generator or an object, or nested deeper than `depth`.
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
            kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
            return [kind.__name__, [encode(part, inner) for part in value]]
        case dict():
            return ["dict", [[encode(key, inner), encode(part, inner)] for key, part in dict.items(value)]]
    raise NotLiteral(f"a {type(value).__name__} is no literal")


def decode(value: Any, depth: int = DEPTH) -> Any:
    """The value that `encode` wrote, made of plain types only.

    Raises:
        NotLiteral: no such writing.
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
            case ["list", list(parts)]:
                return [decode(part, inner) for part in parts]
            case ["tuple", list(parts)]:
                return tuple(decode(part, inner) for part in parts)
            case ["set", list(parts)]:
                return {decode(part, inner) for part in parts}
            case ["frozenset", list(parts)]:
                return frozenset(decode(part, inner) for part in parts)
            case ["dict", list(parts)]:
                return {decode(key, inner): decode(part, inner) for key, part in parts}
    except (TypeError, ValueError, OverflowError) as error:  # A list as a key, say, or digits that are none.
        raise NotLiteral(str(error)) from None
    raise NotLiteral("no literal's writing")


def send(pipe: int, message: Any) -> None:
    """Writes one message: its length in four bytes, then JSON in ASCII."""
    text = json.dumps(message).encode("ascii")
    rest = memoryview(_HEADER.pack(len(text)) + text)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def receive(pipe: int, limit: int) -> Any:
    """Reads one message.

    Raises:
        EOFError: the other side is gone.
        NotLiteral: longer than `limit` bytes, or no JSON.
    """
    (size,) = _HEADER.unpack(_read(pipe, _HEADER.size))
    if size > limit:
        raise NotLiteral(f"a message of {size} bytes is longer than {limit}")
    try:
        return json.loads(_read(pipe, size).decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise NotLiteral(f"no JSON: {error}") from None


def _read(pipe: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(pipe, min(size, 1 << 16))
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
