"""Compares results with published scores of GPT-2 and nanochat, in a table and a plot."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError
from jaxchat.evaluation.core import CORE, centered
from jaxchat.evaluation.curves import drawing

GPT2 = ("GPT-2 124M", "GPT-2 355M", "GPT-2 774M", "GPT-2 1.6B")
NANOCHAT = "nanochat d20"

# Accuracies of OpenAI's checkpoints with nanochat's prompts (eval_bundle of Milpo1/nanochat-pl, MIT); the three larger
# models were scored on at most 1,000 rows per task.
GPT2_CORE: Mapping[str, tuple[float, float, float, float]] = {
    "core/hellaswag_zeroshot": (0.308504, 0.39, 0.44, 0.502),
    "core/jeopardy": (0.001889, 0.044, 0.045, 0.092),
    "core/bigbench_qa_wikidata": (0.282663, 0.428, 0.48, 0.531),
    "core/arc_easy": (0.412458, 0.48, 0.535, 0.595),
    "core/arc_challenge": (0.221843, 0.262, 0.264, 0.299),
    "core/copa": (0.6, 0.66, 0.67, 0.67),
    "core/commonsense_qa": (0.224406, 0.196, 0.27, 0.227),
    "core/piqa": (0.62296, 0.67, 0.698, 0.725),
    "core/openbook_qa": (0.278, 0.308, 0.318, 0.346),
    "core/lambada_openai": (0.322919, 0.426, 0.488, 0.523),
    "core/hellaswag": (0.307907, 0.395, 0.444, 0.512),
    "core/winograd": (0.578755, 0.655678, 0.688645, 0.714286),
    "core/winogrande": (0.486188, 0.521, 0.541, 0.569),
    "core/bigbench_dyck_languages": (0.155, 0.17, 0.225, 0.247),
    "core/agi_eval_lsat_ar": (0.226087, 0.230435, 0.256522, 0.273913),
    "core/bigbench_cs_algorithms": (0.419697, 0.456, 0.44, 0.417),
    "core/bigbench_operators": (0.085714, 0.1, 0.114286, 0.157143),
    "core/bigbench_repeat_copy_logic": (0.03125, 0.0625, 0.0625, 0.09375),
    "core/squad": (0.058278, 0.169, 0.235, 0.309),
    "core/coqa": (0.133659, 0.227, 0.23, 0.28),
    "core/boolq": (0.552294, 0.606, 0.567, 0.619),
    "core/bigbench_language_identification": (0.2566, 0.269, 0.261, 0.25),
}
# karpathy/nanochat's report of October 2025, d20: CORE of the base model, the other scores after SFT.
NANOCHAT_D20 = {
    "core": 0.2219,
    "arc_easy": 0.3876,
    "arc_challenge": 0.2807,
    "mmlu": 0.3151,
    "gsm8k": 0.0455,
    "humaneval": 0.0854,
    "chatcore": 0.0884,
}
BASELINES = {f"core/{task.label}": task.baseline for task in CORE}


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table of the results that have published counterparts; empty if there are none.

    CORE of GPT-2 is averaged over the same tasks as `results`. nanochat published CORE over all 22 tasks only, so its
    column is empty for fewer.
    """
    rows = []
    for name, result in results.items():
        others = [*GPT2_CORE.get(name, (None,) * 4), NANOCHAT_D20.get(name)]
        own = next((result[key] for key in ("accuracy", "core", "chatcore") if key in result), None)
        if name == "core":
            labels = [label for label in results if label in BASELINES]
            others = [*_means(labels), NANOCHAT_D20[name] if len(labels) == len(CORE) else None]
        if own is not None and any(other is not None for other in others):
            score = f"{own:.4f}"
            if result.get("low") is not None:
                score += f" ({result['low']:.4f} to {result['high']:.4f})"
            cells = ("" if other is None else f"{other:.4f}" for other in others)
            rows.append(f"| {name} | {score} | {' | '.join(cells)} |")
    if not rows:
        return []
    return [f"| | this model | {' | '.join((*GPT2, NANOCHAT))} |", "|---" * 7 + "|", *rows]


def report(directory: Path, results: Mapping[str, Mapping[str, Any]], log: Callable[[str], None]) -> None:
    """Writes published.md, with published.png if there are CORE results, unless there is nothing to compare."""
    lines = table(results)
    if not lines:
        return
    if any(name in GPT2_CORE for name in results):
        try:
            draw(results, directory / "published.png")
            lines += ["", "![beside published scores](published.png)"]
        except UserError as error:
            log(f"published.png was not drawn: {error}")
    path = directory / "published.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    log(f"comparison with published scores: {path}")


def _means(labels: Sequence[str]) -> list[float]:
    """CORE of each GPT-2 model, averaged over the tasks `labels`."""
    return [
        sum(centered(GPT2_CORE[label][size], BASELINES[label]) for label in labels) / len(labels)
        for size in range(len(GPT2))
    ]


def draw(results: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Plots centred accuracies of CORE's tasks with 95 percent intervals, and those of GPT-2 for comparison.

    Raises:
        UserError: matplotlib is not installed.
    """
    pyplot = drawing()
    labels = [name for name in reversed(list(results)) if name in GPT2_CORE]
    figure, axis = pyplot.subplots(figsize=(8, 1.2 + 0.32 * len(labels)), constrained_layout=True)
    for size, (model, marker) in enumerate(zip(GPT2, "sd^v")):
        xs = [centered(GPT2_CORE[label][size], BASELINES[label]) for label in labels]
        axis.plot(xs, range(len(labels)), marker, color=str(0.75 - 0.2 * size), markersize=4, label=model)
    for y, label in enumerate(labels):
        result, baseline = results[label], BASELINES[label]
        low, accuracy, high = (centered(result[key], baseline) for key in ("low", "accuracy", "high"))
        axis.plot([low, high], [y, y], color="C3", linewidth=1.5)
        axis.plot(accuracy, y, "o", color="C3", markersize=5, label="this model" if y == 0 else None)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set(yticks=range(len(labels)), yticklabels=[label.removeprefix("core/") for label in labels])
    axis.set_xlabel("centred accuracy: 0 is guessing, 1 is all right")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
