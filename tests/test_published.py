"""Published scores beside one's own: the others' CORE is what they published, and is taken over the tasks asked."""

from pathlib import Path
from typing import Any

import pytest

from jaxchat.evaluation import published
from jaxchat.evaluation.core import CORE
from jaxchat.evaluation.evaluate import summaries

# The last row of the table that the accuracies come from.
GPT2_CORE = (0.113891, 0.184903, 0.214641, 0.256525)


def results(labels: list[str], size: int = 0) -> dict[str, Any]:
    """As if this model were one of GPT-2's sizes."""
    made: dict[str, Any] = {}
    for task in CORE:
        if task.label in labels:
            right = published.GPT2_CORE[f"core/{task.label}"][size]
            shares = {f"centered_{name}": (right - b) / (1 - b) for name, b in task.baselines.items()}
            made[f"core/{task.label}"] = {"accuracy": right, "low": right - 0.01, "high": right + 0.01, **shares}
    return made | summaries(made)


@pytest.mark.parametrize("size", range(4))
def test_core_of_gpt2_is_what_was_published(size: int) -> None:
    everything = [task.label for task in CORE]
    assert results(everything, size)["core"]["core"] == pytest.approx(GPT2_CORE[size], abs=1e-6)
    (line,) = [line for line in published.table(results(everything, size)) if line.startswith("| core |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == cells[1 + size] == f"{GPT2_CORE[size]:.4f}" and cells[5] == "0.2219"


def test_of_some_tasks_the_others_core_is_over_the_same_ones() -> None:
    (line,) = [line for line in published.table(results(["piqa", "squad"])) if line.startswith("| core |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == cells[1] == f"{((0.62296 - 0.5) / 0.5 + 0.058278) / 2:.4f}"
    assert cells[5] == "", "nanochat published the mean over all tasks alone"


def test_a_report_is_written_where_there_is_anything_to_compare(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    published.report(tmp_path / "none", {"facts": {"accuracy": 0.5, "low": None}}, print)
    assert not (tmp_path / "none").exists()
    found = results(["piqa", "squad"]) | {"gsm8k": {"accuracy": 0.1, "low": 0.05, "high": 0.2}}
    published.report(tmp_path, found, print)
    text = (tmp_path / "published.md").read_text()
    assert "| gsm8k | 0.1000 (0.0500 to 0.2000) |  |  |  |  | 0.0455 |" in text and "published.png" in text
    assert (tmp_path / "published.png").stat().st_size > 1000
