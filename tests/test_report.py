"""The report of a pipeline: what it compares is comparable, and a person can read it."""

import dataclasses
from typing import Any

import pytest

from configs import tiny
from jaxchat.evaluation import report
from jaxchat.experiment import STAGES, Experiment
from jaxchat.stages.reporting import as_item

pytestmark = pytest.mark.quick
START = {
    "started": "2026-11-30T20:52:11+00:00",
    "command": "python -m launch.speedrun --config=configs/tiny.py",
    "commit": "213a2aa-changed",
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "processor": "a processor",
    "cores": 2,
    "devices": "2 x cpu",
    "seconds": 60.0,
}


def experiments(**changes: Any) -> dict[str, Experiment]:
    return {stage: dataclasses.replace(tiny.get_config(stage), **changes) for stage in STAGES}


def progress(**results: dict[str, Any]) -> dict[str, Any]:
    return {stage: {"result": result, "starts": [START]} for stage, result in results.items()}


def table(known: dict[str, Any], **changes: Any) -> dict[str, list[str]]:
    """Cells by the names of rows; the first row is named ''."""
    rows = [line.strip("|").split("|") for line in report.scores(experiments(**changes), known) if "---" not in line]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


def test_a_model_has_one_column_and_numbers_of_other_rows_another_row() -> None:
    known = progress(
        pretrain={"val_bpb": 1.0, "val_rows": 200},
        sft={"val_bpb": 1.1, "val_rows": 50, "val_bpb_before": 1.02, "val_rows_before": 50}
        | {"arithmetic_strict": 0.5, "arithmetic_problems": 100, "arithmetic_strict_before": 0.0},
        rl={"val_bpb": 1.1, "val_rows": 50, "val_bpb_before": 1.1, "val_rows_before": 50}
        | {"arithmetic_strict": 1.0, "arithmetic_problems": 100, "arithmetic_strict_before": 0.5},
    )
    known["pretrain"]["base"] = {"arithmetic_strict": 0.25, "arithmetic_problems": 100}
    assert table(known) == {
        "": ["after pretrain", "after sft", "after rl"],
        "arithmetic, strict": ["25.0% (17.5 to 34.3)", "50.0% (40.4 to 59.6)", "100.0% (96.3 to 100.0)"],
        "bits per byte of held-out text, 200 rows (lower is better)": ["1.0000", "", ""],
        "bits per byte of held-out text, 50 rows (lower is better)": ["1.0200", "1.1000", "1.1000"],
    }
    elsewhere = {stage: known[stage] for stage in ("sft",)}
    stages = {"sft": dataclasses.replace(tiny.get_config("sft"), start_from="runs/other/pretrain")}
    assert report.scores(stages, elsewhere)[0] == "| | before sft | after sft |"


def test_the_report_says_what_was_forgotten_and_why() -> None:
    """From each stage to its own start, which was scored on the same rows."""

    def said(*changes: float) -> str:
        stages = dict(zip(("sft", "rl"), changes))
        results = {stage: {"val_bpb_before": 1.0, "val_bpb": value} for stage, value in stages.items()}
        (sentence,) = report.forgetting(progress(pretrain={"val_bpb": 2.0}, **results))
        return sentence

    assert said(1.04) == (
        "Bits per byte of the pretraining text went from 1.0000 to 1.0400 in sft (+4.0%), each on the same rows before "
        "and after."
    )
    for lost in ((1.2,), (1.03, 1.03), (0.9, 1.06)):
        assert "More than 5 percent" in said(*lost) and "--optimizer.scale" in said(*lost)
    assert "More than 5 percent" not in said(0.9, 1.04)
    assert report.forgetting(progress(pretrain={"val_bpb": 2.0}))[0].endswith("not measured after the last stage.")


def test_without_tasks_the_report_says_how_to_ask_some() -> None:
    assert report.explained(experiments(tasks=())["sft"]) == ["No problems were solved: name some with --tasks."]
    assert "Problems are arithmetic:" in report.explained(experiments(tasks=("arithmetic",))["sft"])[0]


def test_costs_are_summed_over_starts_and_name_machine_and_command() -> None:
    known = progress(pretrain={"tokens_per_second": 9000.0, "mfu": 0.5, "peak_memory_bytes": 2**30}, sft={})
    known["pretrain"] |= {"starts": [START, START], "base_seconds": 30.0}
    assert report.costs(known, 60.0)[2:] == [
        "| pretrain | 2.0 | 2.00 | 9,000 | 50.0% | 1.0 GiB |",
        "| sft | 1.0 | 1.00 |  |  |  |",
        "| scoring the base model | 0.5 | 0.50 |  |  |  |",
        "| all | 3.5 | 3.50 |  |  |  |",
    ]
    assert report.costs(known, None)[2] == "| pretrain | 2.0 | 9,000 | 50.0% | 1.0 GiB |"
    (line,) = report.machines(known)
    assert line == (
        "- pretrain 2026-11-30 20:52, pretrain 2026-11-30 20:52, sft 2026-11-30 20:52 (UTC): "
        "`python -m launch.speedrun --config=configs/tiny.py` on 2 x cpu, a processor, 2 cores; "
        "python 3.11.7, jax 0.10.2, commit 213a2aa-changed"
    )


def test_what_a_sample_says_cannot_leave_its_list() -> None:
    item = as_item("Say *this* <|bos|>", " one\n\n# two\n## Step 7\n[a](b) [9 - 4 = 5] ")
    assert item == (
        "- **Say \\*this\\* \\<|bos|>** one  \n    \n  \\# two  \n  \\#\\# Step 7  \n  [a\\](b) [9 - 4 = 5]\n"
    )
    assert as_item("", " words") == "- words\n"


def test_a_share_of_an_unknown_number_of_problems_has_no_interval() -> None:
    """Runs of earlier versions did not record the number."""
    assert set(report.cells({"arithmetic_strict": 0.5}).values()) == {"50.0%"}
    known = report.cells({"arithmetic_strict": 0.5, "arithmetic_problems": 100})
    assert set(known.values()) == {"50.0% (40.4 to 59.6)"}
