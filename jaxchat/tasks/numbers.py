"""Numbers in words that people and models write, compared as numbers."""

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

_NUMBER = re.compile(r"-?\$?\s?-?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:\s?/\s?\d+(?![\d.]))?")


def find_numbers(text: str) -> list[str]:
    """Every number in a text as it is written: $1,800, -3, 18., 1/2."""
    return [found[0] for found in _NUMBER.finditer(text)]


def read_number(text: str) -> Fraction | None:
    """The value of a text that is a number, with or without $, commas, a final point, a percent sign or a unit."""
    match = re.match(r"\s*(" + _NUMBER.pattern + ")", text)
    if not match:
        return None
    top, _, bottom = match[1].replace(",", "").replace("$", "").replace(" ", "").partition("/")
    try:
        value = Fraction(Decimal(top.rstrip("."))) if top.rstrip(".") else None
        return value if value is None or not bottom else value / int(bottom)
    except (InvalidOperation, ZeroDivisionError, ValueError):
        return None


def same_number(one: str, other: str) -> bool:
    """Whether two texts are numbers of the same value."""
    a, b = read_number(one), read_number(other)
    return a is not None and a == b


def last_number(text: str) -> str | None:
    """The last number of a text, as it is written."""
    found = find_numbers(text)
    return found[-1] if found else None
