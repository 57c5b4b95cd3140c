"""The little English the world needs: articles, plurals, pronouns, lists, number words, capitals."""

import re
from typing import NamedTuple

VOWEL_SOUNDS = "aeiou"
SPELLED_WITH_A_VOWEL_BUT_NOT_SOUNDED = ("use", "uni", "one", "eu")
SILENT_H = ("hour", "honest", "heir")
SMALL_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

_SENTENCE_START = re.compile(r'(^|\n|[.!?] |\." )("?)([a-z])')
_QUOTE_START = re.compile(r'([,:] ")([a-z])')


class Pronouns(NamedTuple):
    """The forms of one third person singular: she sees it, it sees her, her kite, by herself."""

    subject: str
    object: str
    possessive: str
    reflexive: str


SHE = Pronouns("she", "her", "her", "herself")
HE = Pronouns("he", "him", "his", "himself")
IT = Pronouns("it", "it", "its", "itself")


def with_article(phrase: str) -> str:
    """The phrase after `a` or `an`, by the sound it begins with: an apple, a useful hour, an hour."""
    word = phrase.lower()
    vowel = word.startswith(tuple(VOWEL_SOUNDS)) and not word.startswith(SPELLED_WITH_A_VOWEL_BUT_NOT_SOUNDED)
    return f"{'an' if vowel or word.startswith(SILENT_H) else 'a'} {phrase}"


def joined(items: list[str] | tuple[str, ...]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def number_word(number: int) -> str:
    """An English number word for 0 <= number <= 400 or so: `thirty-eight`, `one hundred and two`."""
    if number < 20:
        return SMALL_NUMBERS[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] if ones == 0 else f"{TENS[tens]}-{SMALL_NUMBERS[ones]}"
    hundreds, rest = divmod(number, 100)
    start = f"{SMALL_NUMBERS[hundreds]} hundred"
    return start if rest == 0 else f"{start} and {number_word(rest)}"


def capitalised(text: str) -> str:
    """The text with a capital at the start of every sentence and every quotation.

    What follows `?"` or `!"` stays as it is, because it may be the rest of the sentence: `"Where?" asked Mia.`
    """
    text = _SENTENCE_START.sub(lambda found: found[1] + found[2] + found[3].upper(), text)
    return _QUOTE_START.sub(lambda found: found[1] + found[2].upper(), text)
