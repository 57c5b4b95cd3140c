"""Writes report.md of a full pipeline: what was trained, how good it is, what it says, what it cost, and its curves."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxchat.checkpoint import read_experiment
from jaxchat.errors import UserError
from jaxchat.evaluation.curves import SHARE, describe, draw
from jaxchat.evaluation.published import table
from jaxchat.evaluation.statistics import wilson
from jaxchat.experiment import Experiment
from jaxchat.model.counts import parameter_counts

LABELS = {
    "val_loss": "loss on held-out conversations, nats per token (lower is better)",
    "bpb": "bits per byte of the documents of task bpb (lower is better)",
    "core": "CORE",
    "chatcore": "ChatCORE",
}


def write(
    place: Path, progress: Mapping[str, Any], *, log: Callable[[str], None], dollars_per_hour: float | None = None
) -> Path:
    """Writes report.md and its plots into the run directory `place`; returns the path of the report.

    `progress` has what `speedrun.run` knows of each stage, in their order: `result`, `starts`, and of the first `base`.
    """
    stages = {stage: read_experiment(place / stage, Experiment) for stage in progress}
    last = stages[list(stages)[-1]]
    count = f"{parameter_counts(last.model)['total']:,} parameters"
    lines = [f"# {place.name}", "", f"A {'chat' if last.chats else 'base'} model of {count}.", ""]
    lines += ["## What was trained", "", *trained(stages), "", *stability(progress)]
    lines += ["", "## How good it is", "", *scores(stages, progress), "", *explained(last), *published(progress)]
    lines += ["", *forgetting(progress), "", "## What it says", ""]
    for stage in reversed(stages):
        lines += last_samples(stage, place / stage / "samples.md")
    lines += ["## What it cost", "", *costs(progress, dollars_per_hour), "", *machines(progress)]
    lines += ["", "## Curves", ""]
    for stage in stages:
        picture = place / "pictures" / f"{stage}.png"
        try:
            draw([place / stage], picture, title=f"{place.name}: {stage}")
            lines += [f"![curves of {stage}](pictures/{picture.name})", ""]
        except UserError as error:
            log(f"the curves of {stage} were not drawn: {error}")
            lines += [f"No picture of {stage}: {error}.", ""]
    path = place / "report.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    log(f"report: {path}")
    return path


def trained(stages: Mapping[str, Experiment]) -> list[str]:
    """The sizes of the model, and a table of what each stage learnt from, for how long."""
    e = next(iter(stages.values()))
    sizes = f"Depth {e.model.depth}, width {e.model.width}, vocabulary {e.model.vocab:,}"
    lines = [f"{sizes}, context {e.data.row_length:,} tokens, seed {e.seed}.", ""]
    lines += ["| stage | learns from | steps | each step | in all |", "|---|---|---|---|---|"]
    for stage, e in stages.items():
        if e.rl is None:
            source, step, total = e.data.train, f"{e.batch_tokens:,} tokens", f"{e.steps * e.batch_tokens:,} tokens"
        else:
            source, step = e.rl.tasks, f"{e.rl.prompts} problems x {e.rl.samples} answers, {e.rl.objective}"
            total = f"{e.steps // e.rl.updates * e.rl.prompts * e.rl.samples:,} answers"
        lines.append(f"| {stage} | {', '.join(source)} | {e.steps:,} | {step} | {total} |")
    return lines


def scores(stages: Mapping[str, Experiment], progress: Mapping[str, Any]) -> list[str]:
    """Table of scores: a row per measure, a column per model. The base model is prompted as text.

    A stage scores its starting model, too. Scores that only it has, because the stage before measured other things or
    other rows, are entered in the column of the stage before.
    """
    columns: dict[str, Mapping[str, str]] = {}
    for stage, e in stages.items():
        result = {**(progress[stage].get("base") or {}), **progress[stage]["result"]}
        before = {name.removesuffix("_before"): x for name, x in result.items() if name.endswith("_before")}
        started = f"after {e.start_from}"
        if started in columns:
            rows = {name: x for name, x in before.items() if name.startswith("val_")}
            columns[started] = {**cells(rows), **columns[started]}
        elif own := cells(before):
            columns[f"before {stage}"] = own
        columns[f"after {stage}"] = cells(result)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name in sorted({name for column in columns.values() for name in column}, key=str.lower):
        lines.append(f"| {name} | {' | '.join(column.get(name, '') for column in columns.values())} |")
    return lines


def cells(result: Mapping[str, Any]) -> dict[str, str]:
    """The scores of a model, formatted, by their labels. A share has its 95 percent interval (Wilson)."""
    found = {}
    for name, value in result.items():
        if not isinstance(value, float) or name.endswith("_before"):
            continue
        if name == "val_bpb":
            rows = f"{result['val_rows']:,} rows"
            found[f"bits per byte of held-out text, {rows} (lower is better)"] = f"{value:.4f}"
        elif name in LABELS:
            found[LABELS[name]] = f"{value:.4f}"
        elif share := SHARE.fullmatch(name):
            low, high = _interval(value, result, share[1])
            interval = f" ({100 * low:.1f} to {100 * high:.1f})" if f"{share[1]}_problems" in result else ""
            found[describe(name)[0]] = f"{value:.1%}{interval}"
    return found


def _interval(value: float, result: Mapping[str, Any], task: str) -> tuple[float, float]:
    count = result.get(f"{task}_problems", 0)
    return wilson(round(value * count), count)


def explained(e: Experiment) -> list[str]:
    """Sentences on the problems behind the scores, their prompts and judges."""
    if not e.tasks:
        return ["No problems were solved: name some with --tasks."]
    answers = f"{e.eval_samples} answer{'s' * (e.eval_samples > 1)} to each at temperature 1"
    return [
        f"Problems are {', '.join(e.tasks)}: {e.eval_problems:,} test problems of each, or all if there are fewer, "
        f"with {answers}. The strict judge requires the right answer in the form that the task asks for; the "
        "lenient one accepts it anywhere. In brackets are 95 percent intervals. The base model is prompted "
        "with plain text, the later ones with turns of a chat."
    ]


def published(progress: Mapping[str, Any]) -> list[str]:
    """Table of the last stage's scores and published scores; empty if there are none to compare."""
    last = list(progress.values())[-1]["result"]
    tasks = {}
    for name, value in last.items():
        if (share := SHARE.fullmatch(name)) and share[2] in ("strict", "accuracy") and not share[3]:
            tasks[share[1]] = dict(zip(("accuracy", "low", "high"), (value, *_interval(value, last, share[1]))))
        elif name in ("core", "chatcore"):
            tasks[name] = {name: value}
    lines = table(tasks)
    return ["", "Beside published scores:", "", *lines] if lines else []


def forgetting(progress: Mapping[str, Any]) -> list[str]:
    """Sentence on the change of bits per byte of the pretraining text in each later stage, on the same rows."""
    changes, ratios = [], [1.0]
    for stage, known in progress.items():
        before, after = (known["result"].get(name) for name in ("val_bpb_before", "val_bpb"))
        if before and after:
            changes.append(f"from {before:.4f} to {after:.4f} in {stage} ({after / before - 1:+.1%})")
            ratios.append(after / before)
    if not changes:
        return ["The bits per byte of the pretraining text were not measured after the last stage."]
    sentence = f"Bits per byte of the pretraining text went {', '.join(changes)}"
    sentence += ", each on the same rows before and after."
    if max(*ratios, math.prod(ratios)) > 1.05:
        sentence += (
            " More than 5 percent were lost: such a stage trains on other text at these learning rates, and nothing "
            "holds the old text in place; a lower --optimizer.scale there, or --rl.kl above 0, forgets less."
        )
    return [sentence]


def stability(progress: Mapping[str, Any]) -> list[str]:
    """List of unstable steps per stage, with a description of each episode."""
    lines = []
    for stage, known in progress.items():
        result = known["result"]
        if count := result.get("unstable_steps", 0):
            lines += [f"- {stage}: {count} unstable steps", *(f"  - {text}" for text in result["instabilities"])]
    return lines or ["Training was stable: no loss above that of uniform guessing, no spike, no exploding gradient."]


def costs(progress: Mapping[str, Any], dollars_per_hour: float | None) -> list[str]:
    """Table of each stage's wall time, summed over its starts, with its price and speed."""
    priced = dollars_per_hour is not None
    lines = [f"| stage | minutes |{' dollars |' * priced} tokens per second | MFU | peak memory |"]
    lines.append(f"|---|---|{'---|' * priced}---|---|---|")
    seconds = {stage: sum(start["seconds"] for start in known["starts"]) for stage, known in progress.items()}
    base = sum(known.get("base_seconds", 0.0) for known in progress.values())
    for part, took in {**seconds, "scoring the base model": base, "all": sum(seconds.values()) + base}.items():
        cost = f" {took / 3600 * (dollars_per_hour or 0):.2f} |" * priced
        result = progress.get(part, {}).get("result", {})
        speed, mfu, memory = (result.get(name) or 0 for name in ("tokens_per_second", "mfu", "peak_memory_bytes"))
        facts = (speed and f"{speed:,.0f}", mfu and f"{mfu:.1%}", memory and f"{memory / 2**30:.1f} GiB")
        minutes = f"{took / 60:.1f}" if took else "not recorded"
        lines.append(f"| {part} | {minutes} |{cost} {' | '.join(fact or '' for fact in facts)} |")
    return lines


def machines(progress: Mapping[str, Any]) -> Iterator[str]:
    """A line for every command that took part: when each stage was started, on what, with which code and versions."""
    dates: dict[str, list[str]] = {}
    for stage, known in progress.items():
        for start in known["starts"]:
            versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
            versions += f", commit {start['commit']}" if start["commit"] else ""
            machine = f"{start['devices']}, {start['processor']}, {start['cores']} cores"
            about = f"`{start['command']}` on {machine}; {versions}"
            dates.setdefault(about, []).append(f"{stage} {start['started'][:16].replace('T', ' ')}")
    yield from (f"- {', '.join(stages)} (UTC): {about}" for about, stages in dates.items())


def last_samples(stage: str, path: Path) -> list[str]:
    """Lines of the last section of a samples.md file; empty if the file does not exist."""
    if not path.is_file():
        return []
    *_, last = re.split(r"^## ", path.read_text(encoding="utf-8", errors="replace"), flags=re.M)
    title, _, text = last.strip().partition("\n")
    return [f"After {stage}, {title.lower()}:", "", text.strip(), ""]
