"""Pictures of runs: training loss and held-out bits per byte over tokens, out of metrics.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxchat.config import UserError


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


def draw(directories: Sequence[Path], out: Path) -> dict[str, Any]:
    """Draws every run's curves into one picture; returns the last held-out score of each."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        raise UserError("matplotlib is not installed: pip install 'jaxchat[plots]'") from None
    endings = FigureCanvasBase.get_supported_filetypes()
    if out.suffix[1:].lower() not in endings:
        raise UserError(f"--out={out} is no kind of picture: let it end in one of {', '.join(sorted(endings))}")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    last: dict[str, Any] = {}
    for directory in directories:
        records = read_metrics(directory)
        steps = [r for r in records if "loss" in r]
        scores = [r for r in records if "val_bpb" in r]
        tokens = {r["step"]: r["tokens"] for r in steps}
        left.plot([r["tokens"] for r in steps], [r["loss"] for r in steps], linewidth=0.8, label=str(directory))
        scored = [r for r in scores if r["step"] in tokens]
        right.plot(
            [tokens[r["step"]] for r in scored], [r["val_bpb"] for r in scored], marker="o", label=str(directory)
        )
        last[str(directory)] = scores[-1]["val_bpb"] if scores else None
    left.set(xlabel="training tokens", ylabel="training loss (nats a token)")
    right.set(xlabel="training tokens", ylabel="held-out bits per byte")
    left.legend(fontsize="small")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): name another --out") from None
    finally:
        pyplot.close(figure)
    return last
