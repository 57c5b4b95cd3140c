"""What preparation reports of the data that it leaves out, with remedies that are computed from the data."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxchat.data.formats import FORMATS, Format
from jaxchat.data.source import Reading, Source
from jaxchat.data.sources import held_out_from

Longer = Callable[[int], str]
"""Returns the options that make rows of at least so many tokens."""


class Entry(NamedTuple):
    """An entry of train or val: as given, its format (text for an entry text:...), and its sources."""

    spec: str
    form: Format
    sources: list[Source]


def warnings(manifest: dict[str, Any], longer: Longer) -> list[str]:
    """A line for each reason why documents or conversations are not in the rows, or not as they stand."""
    counts = [
        f"{count(manifest, number)} skipped: {reason}; the first is {manifest['examples'][reason]}"
        for reason, number in sorted(manifest["skipped"].items())
    ]
    counts += [f"{count(manifest, number)} {note}" for note, number in sorted(manifest.get("notes", {}).items())]
    if manifest["empty"]:
        counts.append(f"{count(manifest, manifest['empty'])} without text")
    if manifest["too_long"]:
        counts.append(
            f"{count(manifest, manifest['too_long'])} of more than {manifest['row_length'] + 1} tokens left out; "
            f"{longer(manifest['longest'] - 1)} fits the longest"
        )
    return counts


def nothing(manifest: dict[str, Any], spec: str, longer: Longer, division: Callable[[], str | None]) -> str:
    """Error message for an entry of which no row could be made, with the reasons."""
    reasons = warnings(manifest, longer) or [division() or "it holds none"]
    return ". ".join([f"no {FORMATS[manifest['recipe']['form']].noun} to use in {spec}", *reasons])


def division(entries: Sequence[Entry], data: Any) -> str | None:
    """Why the `held_out` share of `data` is all of an entry or nothing at all, and what to do; None if it is neither.

    A document is held out if the share that belongs to its text is below that.
    """
    fraction, reading = data.held_out, Reading(data.text_column, data.encoding)
    shares = [_shares(entry, reading) for entry in entries] if fraction else []
    if not (shares and all(shares)):
        return None
    least, most = min(map(min, shares)), min(map(max, shares))
    if least < fraction <= most:
        return None
    what = "no" if fraction <= least else "every"
    noun = FORMATS[entries[0].form].noun
    problem = f"--data.val_fraction={fraction} holds out {what} {noun}"
    if least < most:
        return f"{problem}: set --data.val_fraction={_between(least, most, fraction)}, or --data.val"
    total = sum(map(len, shares))
    if len(entries) > 1:
        reason = "no share leaves every entry of --data.train something and holds out something"
    elif total == 1:
        reason = f"{entries[0].spec} is one {noun}, which cannot be divided"
    else:
        same = "begin with the same words" if noun == "conversation" else "are the same"
        reason = f"its {total:,} {noun}s {same}, so that they are held out together"
    return f"{problem}: {reason}; set --data.val"


def _shares(entry: Entry, reading: Reading) -> list[float]:
    data_format = FORMATS[entry.form]
    examples = (one for source in entry.sources for one in data_format.examples(source, reading, lambda *_: None))
    return [held_out_from(example.opening) for example in examples if example.text]


def _between(least: float, most: float, wanted: float) -> float:
    """A number above `least` and at most `most` with few digits, near the end where `wanted` is."""
    for digits in range(1, 17):
        scale = 10**digits
        found = math.floor(most * scale) / scale if wanted > most else (math.floor(least * scale) + 1) / scale
        if least < found <= most:
            return found
    return most


def count(manifest: dict[str, Any], number: int) -> str:
    """A number with the noun of the manifest's format, such as "3 conversations"."""
    return f"{number:,} {FORMATS[manifest['recipe']['form']].noun}{'s' * (number != 1)}"
