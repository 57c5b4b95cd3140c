"""Two evaluations, question by question."""

from pathlib import Path
from typing import Any

from jaxchat.errors import UserError
from jaxchat.evaluation.records import read_records
from jaxchat.evaluation.statistics import paired


def compare(first: Path, second: Path) -> dict[str, Any]:
    """The paired test of every task that both directories have records of.

    Raises:
        UserError: they have no task in common, or a task was asked in another way or other questions.
    """
    names = sorted({path.name for path in first.glob("*.jsonl")} & {path.name for path in second.glob("*.jsonl")})
    if not names:
        raise UserError(f"{first} and {second} have no task in common: evaluate both on the same tasks first")
    found: dict[str, Any] = {}
    for name in names:
        (about, mine), (other, theirs) = (read_records(place / name) for place in (first, second))
        if about.get("settings") != other.get("settings"):
            raise UserError(f"{name} was asked in another way in {first} than in {second}: evaluate both alike")
        both = sorted(mine.keys() & theirs.keys())
        if any(mine[i].get("gold") != theirs[i].get("gold") for i in both):
            raise UserError(
                f"{name} asked other questions in {first} than in {second}: evaluate both on the same files"
            )
        if both:
            sides = ([bool(records[i]["right"]) for i in both] for records in (mine, theirs))
            found[about["task"]] = paired(*sides)._asdict()
    return found
