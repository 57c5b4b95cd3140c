"""Plots of training runs: losses, rewards and scores over tokens or steps, read from metrics.jsonl."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxchat.data.cache import read_json
from jaxchat.errors import UserError, missing

SMOOTHED = 50  # Curves of more points get a moving average, over a 25th of them, and the points in pale.
LEAST_SPAN = 0.5  # A y axis covers at least this share of its largest value, so that a change of 2 % looks small.
SHARE = re.compile(r"(.+)_(strict|lenient|accuracy)(_pass@\d+)?")

# Title and y label.
MEASURES = {
    "loss": ("training loss", "nats per token"),
    "val_loss": ("held-out loss", "nats per token"),
    "val_bpb": ("held-out text", "bits per byte"),
    "reward": ("reward", "mean per answer"),
    "answer_tokens": ("length of answers", "tokens"),
    "entropy": ("entropy of the next token", "nats"),
    "kl": ("KL divergence from the start", "nats per answer"),
    "core": ("CORE", "centred accuracy"),
}


class Run(NamedTuple):
    """The records of a stage; `stage` is empty if its experiment.json is missing."""

    stage: str
    records: list[dict[str, Any]]


def read_run(directory: Path) -> Run:
    """Reads a stage directory; raises `UserError` as `read_metrics` does."""
    experiment = read_json(directory / "experiment.json")
    return Run(experiment.get("stage", "") if isinstance(experiment, dict) else "", read_metrics(directory))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl of a stage directory. Raises `UserError` if it is missing or a line is not a record."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"no metrics.jsonl in {directory}: name a stage directory such as runs/tiny/pretrain")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            match json.loads(line):
                case {"step": int()} as record:
                    records.append(record)
                case _:
                    raise ValueError
        except ValueError:
            raise UserError(f"{path} line {number} is not a record: restart the run once to repair the file") from None
    return records


def drawing() -> Any:
    """Returns matplotlib's pyplot with the file-only Agg backend; raises `UserError` if it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise missing("matplotlib is not installed", "plots") from None
    return pyplot


def draw(directories: Sequence[Path], out: Path, *, title: str = "") -> dict[str, Any]:
    """Plots stage directories into one image; returns the last recorded bits per byte of each, or None."""
    runs = {str(directory): [read_run(directory)] for directory in directories}
    draw_groups(runs, out, title=title)
    scores = {label: [r["val_bpb"] for r in run.records if "val_bpb" in r] for label, (run,) in runs.items()}
    return {label: values[-1] if values else None for label, values in scores.items()}


def draw_groups(groups: Mapping[str, Sequence[Run]], out: Path, *, title: str = "") -> None:
    """Plots groups of runs into one image: a panel per stage and measure, a colour per group.

    Raises:
        UserError: matplotlib is missing, `out` has an unknown suffix or cannot be written, or there is nothing to plot.
    """
    pyplot = drawing()
    from matplotlib.backend_bases import FigureCanvasBase

    suffixes = FigureCanvasBase.get_supported_filetypes()
    if out.suffix[1:].lower() not in suffixes:
        raise UserError(f"--out={out} is not an image file: use one of the suffixes {', '.join(sorted(suffixes))}")
    stages = dict.fromkeys(run.stage for runs in groups.values() for run in runs)
    panels = [(stage, name) for stage in stages for name in measures(groups, stage)]
    if not panels:
        raise UserError("nothing to plot: no run has recorded a step yet")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.5 * columns, 4 * rows), constrained_layout=True, squeeze=False
    )
    for axis, (stage, name) in zip(axes.flat, panels):
        _panel(axis, groups, stage, name)
        if len(stages) > 1:
            axis.set_title(f"{stage}: {axis.get_title()}")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    if len(groups) > 1:
        figure.legend(handles.values(), handles, loc="outside lower center", fontsize="small")
    figure.suptitle(title or (next(iter(groups)) if len(groups) == 1 else ""))
    save(figure, out)


def save(figure: Any, out: Path) -> None:
    """Writes a figure of pyplot to a file and closes it; raises `UserError` if the file cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): set another --out") from None
    finally:
        drawing().close(figure)


def _panel(axis: Any, groups: Mapping[str, Sequence[Run]], stage: str, name: str) -> None:
    """Draws a measure of a stage; held-out text that was scored on other rows than usual is a hollow point."""
    from matplotlib import ticker

    runs = {label: [run.records for run in group if run.stage == stage] for label, group in groups.items()}
    by_tokens = all(has_tokens(records, name) for group in runs.values() for records in group)
    values, others = list[float](), False
    for number, (label, group) in enumerate(runs.items()):
        for repeat, records in enumerate(group):
            x, y, usual = curve(records, name, by_tokens=by_tokens)
            values += y[np.isfinite(y)].tolist()
            style = {"color": f"C{number}", "linewidth": 0.8, "linestyle": ("-", "--", ":")[number // 10 % 3]}
            named = style | {"label": None if repeat else label}
            if len(x) > SMOOTHED:
                axis.plot(x, y, **style, alpha=0.3)
                axis.plot(x, smooth(y), **named | {"linewidth": 1.5})
            else:
                axis.plot(x[usual], y[usual], **named, marker="o", markersize=3)
                axis.plot(x[~usual], y[~usual], "o", color=f"C{number}", markersize=4, fillstyle="none")
            others |= not usual.all()
    share, (title, unit) = SHARE.fullmatch(name), describe(name)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    title += " (hollow: on other rows)" * others
    axis.set(title=title, xlabel="training tokens" if by_tokens else "step", ylabel=unit)
    if share:
        axis.set_ylim(-0.02, 1.02)
    elif values and max(values) - min(values) < LEAST_SPAN * max(map(abs, values)):
        middle, half = (max(values) + min(values)) / 2, LEAST_SPAN / 2 * max(map(abs, values))
        axis.set_ylim(middle - half, middle + half)
    axis.grid(alpha=0.3)


def describe(name: str) -> tuple[str, str]:
    """Title and unit of a measure."""
    share = SHARE.fullmatch(name)
    if share is None:
        return MEASURES[name]
    return ", ".join(part.strip("_") for part in share.groups() if part), "share right"


def measures(groups: Mapping[str, Sequence[Run]], stage: str) -> list[str]:
    """Names of the recorded measures to plot: known ones, without the loss if there are rewards, and task scores."""
    runs = [run for group in groups.values() for run in group if run.stage == stage]
    recorded = {name for run in runs for record in run.records for name in record}
    known = [name for name in MEASURES if name in recorded and (name != "loss" or "reward" not in recorded)]
    return known + sorted(name for name in recorded if name.endswith(("_strict", "_accuracy")))


def has_tokens(records: Sequence[dict[str, Any]], name: str) -> bool:
    """Whether the number of training tokens is known at every point of a measure."""
    steps = {record["step"] for record in records if "tokens" in record} | {0}
    return len(steps) > 1 and all(record["step"] in steps for record in records if name in record)


def curve(
    records: Sequence[dict[str, Any]], name: str, *, by_tokens: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y of a measure (NaN where it was not finite), and whether each point was scored on the usual rows.

    x is training tokens or steps. Usual are the rows of most points.
    """
    tokens = {record["step"]: record["tokens"] for record in records if "tokens" in record}
    points = [record for record in records if name in record]
    x = [tokens.get(record["step"], 0) if by_tokens else record["step"] for record in points]
    rows = [record.get("val_rows") if name == "val_bpb" else None for record in points]
    usual = Counter(rows).most_common(1)[0][0] if rows else None
    return (
        np.array(x, float),
        np.array([record[name] for record in points], float),
        np.array([own == usual for own in rows], bool),
    )


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving average over a 25th of the values, fewer near the ends; NaN stays NaN and enters no average."""
    finite, at = np.isfinite(y), np.arange(len(y))
    half = np.minimum(len(y) // 50, np.minimum(at, at[::-1]))
    sums, counts = (np.append(0.0, np.cumsum(part)) for part in (np.where(finite, y, 0.0), finite))
    within = lambda total: total[at + half + 1] - total[at - half]  # noqa: E731
    return np.where(finite, within(sums) / np.maximum(within(counts), 1), np.nan)
