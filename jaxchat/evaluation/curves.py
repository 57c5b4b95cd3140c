"""Pictures of runs: losses, rewards and scores over tokens or steps, out of metrics.jsonl."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a stage directory's metrics.jsonl."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"no metrics.jsonl in {directory}: name a stage directory such as runs/tiny/pretrain")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path} line {number} is not JSON: was the run killed? start it again once") from None
    return records


def drawing() -> Any:
    """matplotlib's pyplot, drawing into files; raises `UserError` where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise UserError("matplotlib is not installed: pip install 'jaxchat[plots]'") from None
    return pyplot


def draw(directories: Sequence[Path], out: Path) -> dict[str, Any]:
    """Draws every run's curves into one picture, a panel for each measure; returns the last bits per byte of each."""
    runs = {str(directory): [read_metrics(directory)] for directory in directories}
    draw_groups(runs, out)
    scores = {label: [r["val_bpb"] for r in records if "val_bpb" in r] for label, (records,) in runs.items()}
    return {label: found[-1] if found else None for label, found in scores.items()}


def draw_groups(groups: Mapping[str, Sequence[list[dict[str, Any]]]], out: Path) -> None:
    """Draws groups of runs, each run a list of records, into one picture: a panel per measure, a colour per group."""
    pyplot = drawing()
    from matplotlib.backend_bases import FigureCanvasBase

    endings = FigureCanvasBase.get_supported_filetypes()
    if out.suffix[1:].lower() not in endings:
        raise UserError(f"--out={out} is no kind of picture: let it end in one of {', '.join(sorted(endings))}")
    names = measures([record for runs in groups.values() for records in runs for record in records])
    if not names:
        raise UserError("there is nothing to draw: no run has recorded a step")
    columns = min(3, len(names))
    size = (5.5 * columns, 4 * -(-len(names) // columns))
    figure, axes = pyplot.subplots(
        -(-len(names) // columns), columns, figsize=size, constrained_layout=True, squeeze=False
    )
    for axis, name in zip(axes.flat, names):
        for number, (label, runs) in enumerate(groups.items()):
            for again, records in enumerate(runs):
                xs, ys, of = curve(records, name)
                style = {"marker": "o" if len(xs) < 50 else None, "linestyle": ("-", "--", ":")[number // 10 % 3]}
                style |= {"color": f"C{number}", "label": None if again else label}
                axis.plot(xs, ys, linewidth=0.8, markersize=3, **style)
                axis.set(xlabel=of, ylabel=MEASURES.get(name, name))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize="small")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): name another --out") from None
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
    """What there is to draw: the loss of training unless answers were rewarded, and what evaluations found."""
    found = {name for record in records for name in record}
    known = [name for name in MEASURES if name in found and (name != "loss" or "reward" not in found)]
    return known + sorted(name for name in found if name.endswith(("_strict", "_accuracy")))


def curve(records: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[Any], str]:
    """A measure over training tokens, or over steps where those are not counted; and which of the two."""
    tokens = {record["step"]: record["tokens"] for record in records if "tokens" in record}
    points = [(record["step"], record[name]) for record in records if name in record]
    if tokens and all(step in tokens or step == 0 for step, _ in points):
        return [tokens.get(step, 0) for step, _ in points], [y for _, y in points], "training tokens"
    return [step for step, _ in points], [y for _, y in points], "step"
