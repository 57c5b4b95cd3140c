"""Parses numbers in the text of people and models, and compares them by value."""

import re
from decimal import Decimal
from fractions import Fraction

# A minus sign after a number is a subtraction: 5-3 does not contain -3. Fractions have no spaces: 16 / 2 is a division.
_NUMBER = re.compile(
    r"(?P<sign>(?:(?<![\w).])[-\u2212])?(?:\$\s?[-\u2212]?)?)"
    r"(?P<top>\d(?:,?\d)*(?:\.\d+)?|\.\d+)(?:/(?P<bottom>\d+)(?!\d|[.,]\d))?"
)
_SIGN_APART = re.compile(r"\A\s*([-\u2212])\s+(?=[\d$.])")
_CALCULATION = re.compile(r"[\d)]\s?[-+*/x\u2212\u00d7\u00f7]\s?$")  # Text before the last number of a calculation.


def read_number(text: str) -> Fraction | None:
    """Value of the number at the start of a text (18, 18., $18, 1,800, -3, 5%, 1/2, 18 dollars), or None."""
    match = _NUMBER.match(_SIGN_APART.sub(r"\1", text).lstrip())
    return None if match is None else _value(match)


def same_number(one: str, other: str) -> bool:
    """Whether two texts begin with numbers of equal value."""
    a, b = read_number(one), read_number(other)
    return a is not None and a == b


def last_number(text: str) -> Fraction | None:
    """Value of the last number in a text; None if there is none or it ends a calculation, which is not an answer.

    The latter happens when a tool's output directly follows its call: call 7 + 5 and output 12 read 7 + 512.
    """
    matches = list(_NUMBER.finditer(text))
    if not matches or _CALCULATION.search(text[: matches[-1].start()][-4:]):
        return None
    return _value(matches[-1])


def _value(match: re.Match[str]) -> Fraction | None:
    try:
        value = Fraction(Decimal(match["top"].replace(",", ""))) / int(match["bottom"] or 1)
    except (ValueError, ZeroDivisionError):  # Python refuses to parse integers of more than 4,300 digits.
        return None
    return -value if match["sign"].strip("$ \t\n") else value
