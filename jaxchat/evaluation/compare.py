"""Compares two evaluations question by question."""

from pathlib import Path
from typing import Any

from jaxchat.errors import UserError
from jaxchat.evaluation.records import read_records
from jaxchat.evaluation.statistics import paired


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Runs the paired test on every task for which both directories have records.

    Raises:
        UserError: a directory is missing or has no records, no task is in both, or the settings, questions or judges of
            a task differ.
    """
    for place in (first, second):
        if not any(place.glob("*.jsonl")):
            problem = "has no records of answers" if place.is_dir() else "is not a directory"
            hint = 'give the directory that launch.evaluate printed as "out", such as runs/NAME/sft/eval/500-...'
            raise UserError(f"{place} {problem}: {hint}")
    names = sorted({path.name for path in first.glob("*.jsonl")} & {path.name for path in second.glob("*.jsonl")})
    if not names:
        raise UserError(f"{first} and {second} have no task in common: evaluate both on the same tasks first")
    results: dict[str, Any] = {}
    for name in names:
        (about, records), (other_about, others) = (read_records(place / name) for place in (first, second))
        if about.get("settings") != other_about.get("settings"):
            raise UserError(
                f"{name}: the settings in {first} and {second} differ; evaluate both with the same settings"
            )
        codes, other_codes = ({record.get("code") for record in side.values()} - {None} for side in (records, others))
        if codes != other_codes:
            raise UserError(
                f"{name}: other code of the task judged the answers in {first} than those in {second}; run both "
                "evaluations again, which judges the recorded answers again"
            )
        both = sorted(records.keys() & others.keys())
        if any(records[i].get("gold") != others[i].get("gold") for i in both):
            raise UserError(f"{name}: the questions in {first} and {second} differ; evaluate both on the same files")
        if both:
            sides = ([bool(side[i]["right"]) for i in both] for side in (records, others))
            results[about["task"]] = paired(*sides)._asdict()
    return results
