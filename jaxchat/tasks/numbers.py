"""Numbers in words that people and models write, compared as numbers."""

import re
from decimal import Decimal
from fractions import Fraction

# A minus sign stands at a number and not after one: 5-3 is no -3. A fraction has no spaces: 16 / 2 is a calculation.
_NUMBER = re.compile(
    r"(?P<sign>(?:(?<![\w).])[-\u2212])?(?:\$\s?[-\u2212]?)?)"
    r"(?P<top>\d(?:,?\d)*(?:\.\d+)?|\.\d+)(?:/(?P<bottom>\d+)(?!\d|[.,]\d))?"
)
_SIGN_APART = re.compile(r"\A\s*([-\u2212])\s+(?=[\d$.])")
_CALCULATION = re.compile(r"[\d)]\s?[-+*/x\u2212\u00d7\u00f7]\s?$")  # what stands before its last number


def read_number(text: str) -> Fraction | None:
    """The value that a text begins with: 18, 18., $18, 1,800, -3, 5%, 1/2, 18 dollars; None where it is no number."""
    match = _NUMBER.match(_SIGN_APART.sub(r"\1", text).lstrip())
    return None if match is None else _value(match)


def same_number(one: str, other: str) -> bool:
    """Whether two texts begin with numbers of the same value."""
    a, b = read_number(one), read_number(other)
    return a is not None and a == b


def last_number(text: str) -> Fraction | None:
    """The value of the last number of a text; None where it is the end of a calculation, which is no answer.

    So it is where a tool's output touches its call: 7 + 5 and 12, which the answer does not repeat, read 7 + 512.
    """
    matches = list(_NUMBER.finditer(text))
    if not matches or _CALCULATION.search(text[: matches[-1].start()][-4:]):
        return None
    return _value(matches[-1])


def _value(match: re.Match[str]) -> Fraction | None:
    try:
        value = Fraction(Decimal(match["top"].replace(",", ""))) / int(match["bottom"] or 1)
    except (ValueError, ZeroDivisionError):  # Python reads no integer of more than 4,300 digits.
        return None
    return -value if match["sign"].strip("$ \t\n") else value
