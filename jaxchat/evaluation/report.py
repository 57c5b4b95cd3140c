"""Writes report.md of a full pipeline: plan, scores before and after each stage, curves, samples, time and cost."""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError
from jaxchat.evaluation.curves import draw
from jaxchat.evaluation.published import table

SCORES = ("val_bpb", "val_rows", "val_loss", "bpb", "core", "chatcore")  # Task scores are recognized by suffix.


def write(
    place: Path,
    stages: Sequence[str],
    progress: Mapping[str, Any],
    *,
    log: Callable[[str], None],
    dollars_per_hour: float | None = None,
) -> Path:
    """Writes report.md and its plots into the run directory `place`; returns the path of the report."""
    lines = [f"# {place.name}", "", *plan(place, stages), "", "## Scores", "", *scores(stages, progress)]
    lines += ["", asked(place / stages[-1]), *published(stages, progress)]
    lines += ["", *forgetting(stages, progress), "", *stability(stages, progress)]
    lines += ["", "## Time", "", *times(stages, progress, dollars_per_hour)]
    for stage in stages:
        lines += ["", f"## {stage}", ""]
        picture = place / "pictures" / f"{stage}.png"
        try:
            draw([place / stage], picture)
            lines += [f"![curves of {stage}](pictures/{picture.name})", ""]
        except UserError as error:
            log(f"the curves of {stage} were not drawn: {error}")
            lines += [f"No picture: {error}.", ""]
        lines += last_samples(place / stage / "samples.md")
    path = place / "report.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    log(f"report: {path}")
    return path


def plan(place: Path, stages: Sequence[str]) -> list[str]:
    """Table of each stage's model, steps, batch and data, read from its experiment.json."""
    lines = ["## Plan", "", "| stage | model | steps | a step | learns from |", "|---|---|---|---|---|"]
    for stage in stages:
        e = json.loads((place / stage / "experiment.json").read_text(encoding="utf-8"))
        rl, model = e.get("rl"), e["model"]
        answers = rl and f"{rl['prompts']} prompts x {rl['samples']} answers, {rl['objective']}"
        step = answers or f"{e['batch_tokens']:,} tokens"
        source = e["data"]["train"] if rl is None else rl["tasks"]
        about = f"depth {model['depth']}, width {model['width']}, vocabulary {model['vocab']:,}"
        lines.append(f"| {stage} | {about} | {e['steps']:,} | {step} | {', '.join(source)} |")
    return lines


def scores(stages: Sequence[str], progress: Mapping[str, Any]) -> list[str]:
    """Table of scores: a row per measure, columns before and after each stage. The base model is prompted as text."""
    columns: dict[str, Mapping[str, Any]] = {}
    for stage in stages:
        after = (progress[stage].get("base") or {}) | progress[stage]["result"]
        before = {name.removesuffix("_before"): x for name, x in after.items() if name.endswith("_before")}
        columns |= {f"before {stage}": before, f"after {stage}": after} if before else {f"after {stage}": after}
    names = [name for name in dict.fromkeys(key for column in columns.values() for key in column) if _is_score(name)]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name in names:
        cells = [column.get(name) for column in columns.values()]
        lines.append(f"| {name} | {' | '.join(map(_cell, cells))} |")
    return lines


def asked(directory: Path) -> str:
    """Sentence on the problems behind the scores and their prompts, from the last stage's experiment.json."""
    e = json.loads((directory / "experiment.json").read_text(encoding="utf-8"))
    if not e["tasks"]:
        return "No problems were asked: name some with --tasks."
    return (
        f"Problems are {', '.join(e['tasks'])}: {e['eval_problems']:,} of the test side of each, or all where it has "
        f"fewer, {e['eval_samples']} answer{'s' * (e['eval_samples'] > 1)} to each at temperature 1. The base model is "
        "asked in the words of its text, and before the next stage, the same model, as a chat model."
    )


def published(stages: Sequence[str], progress: Mapping[str, Any]) -> list[str]:
    """Table of the last stage's scores and published scores; empty if there are none to compare."""
    last = progress[stages[-1]]["result"]
    tasks = {name.removesuffix("_accuracy"): {"accuracy": x} for name, x in last.items() if name.endswith("_accuracy")}
    tasks |= {name: {name: last[name]} for name in ("core", "chatcore") if name in last}
    lines = table(tasks)
    return ["", "Beside published scores:", "", *lines] if lines else []


def forgetting(stages: Sequence[str], progress: Mapping[str, Any]) -> list[str]:
    """Sentence on the change of bits per byte of the pretraining text from the first to the last stage."""
    base, last = (progress[stage]["result"].get("val_bpb") for stage in (stages[0], stages[-1]))
    if not base or not last:
        return ["The bits per byte of the pretraining text were not measured after the last stage."]
    change = last / base - 1
    sentence = f"Bits per byte of the pretraining text went from {base:.4f} to {last:.4f} ({change:+.1%})."
    results = {stage: progress[stage]["result"] for stage in stages}
    measured = [(stage, result["val_bpb"]) for stage, result in results.items() if "val_bpb" in result]
    lost = [
        f"{after} {worse:.4f} after {better:.4f} ({worse / better - 1:+.1%})"
        for (_, better), (after, worse) in itertools.pairwise(measured)
        if worse / better > 1.05
    ]
    if lost or change > 0.05:
        sentence += (
            f" More than 5 percent were lost{' in ' if lost else ''}{', '.join(lost)}: that stage trains on other text "
            "at these learning rates, and nothing holds the old text in place; a lower --optimizer.scale there, or "
            "--rl.kl above 0, forgets less."
        )
    return [sentence]


def stability(stages: Sequence[str], progress: Mapping[str, Any]) -> list[str]:
    """List of unstable steps per stage, with a description of each episode."""
    lines = []
    for stage in stages:
        result = progress[stage]["result"]
        if count := result.get("unstable_steps", 0):
            lines += [f"- {stage}: {count} unstable steps", *(f"  - {text}" for text in result["instabilities"])]
    return lines or ["Training was stable: no loss above that of uniform guessing, no spike, no exploding gradient."]


def times(stages: Sequence[str], progress: Mapping[str, Any], dollars_per_hour: float | None) -> list[str]:
    """Table of each stage's wall time, summed over restarts, and its cost. A killed run may lack its last seconds."""
    priced = dollars_per_hour is not None
    lines = [f"| stage | minutes |{' dollars |' * priced}", f"|---|---|{'---|' * priced}"]
    seconds = {part: known["seconds"] for part, known in progress.items() if "seconds" in known}
    for stage, took in {**seconds, "all": sum(seconds.values())}.items():
        cost = f" {took / 3600 * (dollars_per_hour or 0):.2f} |" * priced
        lines.append(f"| {stage} | {took / 60:.1f} |{cost}")
    return lines


def last_samples(path: Path) -> list[str]:
    """Lines of the last section of a samples.md file; empty if the file does not exist."""
    if not path.is_file():
        return []
    parts = re.split(r"^## ", path.read_text(encoding="utf-8", errors="replace"), flags=re.M)
    return [f"Samples, {line}" if i == 0 else line for i, line in enumerate(parts[-1].strip().splitlines())]


def _cell(x: float | None) -> str:
    """Formats a score, or an integer count; None becomes an empty cell."""
    if x is None:
        return ""
    return f"{x:,}" if isinstance(x, int) else f"{x:.4f}"


def _is_score(name: str) -> bool:
    return name in SCORES or name.endswith(("_strict", "_lenient", "_accuracy")) or "_pass@" in name
