"""Prints the results of an evaluation as a table in the terminal."""

from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table


def score_table(results: Mapping[str, Mapping[str, Any]], file: TextIO) -> None:
    """Prints a row per task: score, interval, centred score, number of questions and number truncated."""
    table = Table()
    for name in ("task", "score", "95 percent interval", "centred", "questions", "truncated"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for name, result in results.items():
        value = next(result[key] for key in ("accuracy", "bpb", "core", "chatcore") if key in result)
        low, high = result.get("low"), result.get("high")
        interval = "" if low is None else f"{low:.4f} to {high:.4f}"
        centred = next((f"{result[key]:.4f}" for key in ("centered_v1", "centered_chance") if key in result), "")
        count = f"{result['tasks']} of {result['of']} tasks" if "tasks" in result else str(result.get("count", ""))
        table.add_row(name, f"{value:.4f}", interval, centred, count, str(result.get("truncated", "")))
    Console(file=file, width=None if file.isatty() else 120).print(table)
