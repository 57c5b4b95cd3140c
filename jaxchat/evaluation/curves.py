"""Plots of training runs: losses, rewards and scores over tokens or steps, read from metrics.jsonl."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError


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
        raise UserError("matplotlib is not installed: pip install 'jaxchat[plots]'") from None
    return pyplot


def draw(directories: Sequence[Path], out: Path) -> dict[str, Any]:
    """Plots stage directories into one image; returns the last recorded bits per byte of each, or None."""
    runs = {str(directory): [read_metrics(directory)] for directory in directories}
    draw_groups(runs, out)
    scores = {label: [r["val_bpb"] for r in records if "val_bpb" in r] for label, (records,) in runs.items()}
    return {label: values[-1] if values else None for label, values in scores.items()}


def draw_groups(groups: Mapping[str, Sequence[list[dict[str, Any]]]], out: Path) -> None:
    """Plots groups of runs into one image: a panel per measure, a colour per group. A run is a list of records.

    Raises:
        UserError: matplotlib is missing, `out` has an unknown suffix or cannot be written, or there is nothing to plot.
    """
    pyplot = drawing()
    from matplotlib.backend_bases import FigureCanvasBase

    suffixes = FigureCanvasBase.get_supported_filetypes()
    if out.suffix[1:].lower() not in suffixes:
        raise UserError(f"--out={out} is not an image file: use one of the suffixes {', '.join(sorted(suffixes))}")
    names = measures([record for runs in groups.values() for records in runs for record in records])
    if not names:
        raise UserError("nothing to plot: no run has recorded a step yet")
    columns = min(3, len(names))
    size = (5.5 * columns, 4 * -(-len(names) // columns))
    figure, axes = pyplot.subplots(
        -(-len(names) // columns), columns, figsize=size, constrained_layout=True, squeeze=False
    )
    for axis, name in zip(axes.flat, names):
        for number, (label, runs) in enumerate(groups.items()):
            for repeat, records in enumerate(runs):
                xs, ys, x_label = curve(records, name)
                style = {"marker": "o" if len(xs) < 50 else None, "linestyle": ("-", "--", ":")[number // 10 % 3]}
                style |= {"color": f"C{number}", "label": None if repeat else label}
                axis.plot(xs, ys, linewidth=0.8, markersize=3, **style)
                axis.set(xlabel=x_label, ylabel=MEASURES.get(name, name))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize="small")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): set another --out") from None
    finally:
        pyplot.close(figure)


MEASURES = {
    "loss": "training loss (nats a token)",
    "val_loss": "held-out loss (nats a trained token)",
    "val_bpb": "held-out bits per byte",
    "reward": "mean reward of an answer",
    "answer_tokens": "tokens an answer",
    "entropy": "entropy (nats a token)",
    "kl": "KL to the start (nats an answer)",
    "core": "CORE",
}


def measures(records: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the recorded measures to plot: known ones, without the loss if there are rewards, and task scores."""
    recorded = {name for record in records for name in record}
    known = [name for name in MEASURES if name in recorded and (name != "loss" or "reward" not in recorded)]
    return known + sorted(name for name in recorded if name.endswith(("_strict", "_accuracy")))


def curve(records: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[Any], str]:
    """Returns x and y values of a measure and the label of x: training tokens if every point has them, else steps."""
    tokens = {record["step"]: record["tokens"] for record in records if "tokens" in record}
    points = [(record["step"], record[name]) for record in records if name in record]
    if tokens and all(step in tokens or step == 0 for step, _ in points):
        return [tokens.get(step, 0) for step, _ in points], [y for _, y in points], "training tokens"
    return [step for step, _ in points], [y for _, y in points], "step"
