"""Parses numbers in the text of people and models, and compares them by value."""

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

Replacement = str | Callable[[re.Match[str]], str]
# Spellings of numbers, rewritten to N or N.N, N/N, N N/N and NeN. Thousands have the same mark throughout.
_SPELLINGS: tuple[tuple[re.Pattern[str], Replacement], ...] = (
    (re.compile(r"\{,\}|,?\\[,!]|(?<=\d)(?:\\[:; ]|~)(?=\d)"), ","),
    (re.compile(r"\\(?=[$%])"), ""),
    (re.compile(r"\\times|\\cdot"), "*"),
    (re.compile(r"\\div"), "\u00f7"),
    (  # German
        re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3}){2,})(?:,(\d+))?(?![.,]?\d)"),
        lambda match: match[1].replace(".", "") + (f".{match[2]}" if match[2] else ""),
    ),
    (re.compile(r"(?<!\d)(\d{1,2}(?:,\d{2})+,\d{3})(?!\d)"), lambda match: match[1].replace(",", "")),  # Indian
    (
        re.compile(r"(?<![\d.])\d{1,3}([, '_\u00a0\u2007-\u200a\u2019\u202f])\d{3}(?:\1\d{3})*(?!\d)"),
        lambda match: match[0].replace(match[1], ""),
    ),
    (re.compile("(?<=\\d)\\s?(?=\\\\[dt]?frac|[\u00bc-\u00be\u2150-\u215e])"), " "),  # Mixed numbers
    (re.compile(r"\\[dt]?frac(?:\{(\d+)\}\{(\d+)\}| ?(\d) ?(\d))"), r"\1\3/\2\4"),
    (re.compile("[\u00bc-\u00be\u2150-\u215e]"), lambda match: unicodedata.normalize("NFKC", match[0])),
    (
        re.compile(
            r"(?<=\d)\s?[x*\u00b7\u00d7\u22c5]\s?10\s?"
            r"(?:(?:\^|\*\*)\s?\{?([-+\u2212]?\d+)\}?|([\u207a\u207b]?[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+))"
        ),
        lambda match: "e" + unicodedata.normalize("NFKC", match[1] or match[2]).replace("\u2212", "-"),
    ),
)
# A minus sign after a number is a subtraction: 5-3 does not contain -3. Fractions have no spaces: 16 / 2 is a division.
_NUMBER = re.compile(
    r"(?P<sign>(?:(?<![\w).])[-\u2013\u2212])?(?:[$\u20ac\u00a3]\s?[-\u2013\u2212]?)?)"
    r"(?:(?P<whole>\d+) (?=\d+[/\u2044]\d+(?!\d|[.,]\d)))?(?P<top>\d+(?:\.\d+)?|\.\d+)"
    r"(?:[/\u2044](?P<bottom>\d+)(?!\d|[.,]\d)|[eE](?P<power>[-+]?\d+))?"
)
_SIGN_APART = re.compile(r"\A\s*([-\u2212])\s+(?=[\d$.])")
_CALCULATION = re.compile(r"[\d)]\s?[-+*/x\u2212\u00d7\u00f7]\s?$")  # Text before the last number of a calculation.


def read_number(text: str) -> Fraction | None:
    """Value of the number at the start of a text (18, 18., $18, 1,800, -3, 5%, 1/2, 18 dollars), or None."""
    match = _NUMBER.match(_SIGN_APART.sub(r"\1", _spelled(text)).lstrip().removeprefix("+"))
    return None if match is None else _value(match)


def same_number(one: str, other: str) -> bool:
    """Whether two texts begin with numbers of equal value."""
    a, b = read_number(one), read_number(other)
    return a is not None and a == b


def last_number(text: str) -> Fraction | None:
    """Value of the last number in a text; None if there is none or it ends a calculation, which is not an answer.

    The latter happens when a tool's output directly follows its call: call 7 + 5 and output 12 read 7 + 512.
    """
    text = _spelled(text)
    matches = list(_NUMBER.finditer(text))
    if not matches or _CALCULATION.search(text[: matches[-1].start()][-4:]):
        return None
    return _value(matches[-1])


def _spelled(text: str) -> str:
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    try:
        power = int(match["power"] or 0)
        value = Fraction(Decimal(match["top"])) / int(match["bottom"] or 1) + int(match["whole"] or 0)
        value *= Fraction(10) ** power if abs(power) <= 999 else Fraction(1, 0)
    except (ValueError, ZeroDivisionError):  # Python refuses to parse integers of more than 4,300 digits.
        return None
    return -value if match["sign"].strip("$\u20ac\u00a3 \t\n") else value
