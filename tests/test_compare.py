"""Variants are trained with the same seeds, resumed after a kill, and compared seed by seed."""

import json
import math
import statistics
from pathlib import Path

import pytest

import launch.compare
from jaxchat import comparison, stages
from jaxchat.config import UserError
from jaxchat.evaluation.statistics import paired_means
from jaxchat.signals import Interrupted
from jaxchat.train import Diverged

ROOT = Path(__file__).parent.parent


def flags(place, *variants, **more):
    common = {
        "config": "configs/tiny.py",
        "depth": 1,
        "head_dim": 8,
        "batch_tokens": 640,
        "data.vocab": 400,
        "data.row_length": 160,
        "data.workers": 1,
        "data.train": "tinyworld:train:150",
        "data.val": "tinyworld:val:4",
        "micro_rows": 2,
        "mesh.data": 2,
        "save_every": 2,
        "eval_every": 4,
        "eval_rows": 4,
        "steps": 6,
        "directory": place / "runs",
    } | more
    return [*(f"--{key}={value}" for key, value in common.items()), "--seeds", "0", "1", "--variants", *variants]


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_interval_of_paired_means_is_students():
    first, second = [1.0, 2.0, 4.0], [1.5, 2.2, 4.9]
    found = paired_means(first, second)
    # Differences 0.5, 0.2, 0.9: standard error 0.2028, times 4.3027, the t quantile of two degrees of freedom.
    assert found.difference == pytest.approx(0.53333, abs=1e-5) and found.interval is not None
    half = 4.302653 * statistics.stdev([0.5, 0.2, 0.9]) / math.sqrt(3)
    assert found.interval == pytest.approx((0.533333 - half, 0.533333 + half), abs=1e-5)
    assert paired_means([1.0], [2.0]).interval is None


def test_verdicts_follow_the_interval_and_the_direction_of_the_measure():
    values = {
        "base": [1.0, 1.1, 1.2],
        "lower": [0.8, 0.91, 1.0],
        "same": [1.1, 1.0, 1.2],
        "lost": [0.9, None, 1.0],
    }
    verdicts = {row.name: row.verdict for row in comparison.rows(values, "val_bpb")}
    assert verdicts == {
        "base": "baseline",
        "lower": "better",
        "same": "undecided",
        "lost": "diverged with 1 of 3 seeds",
    }
    assert {row.name: row.verdict for row in comparison.rows(values, "core_strict")}["lower"] == "worse"
    assert comparison.rows({"base": [1.0], "one": [0.5]}, "val_bpb")[1].verdict == "undecided"
    assert comparison.rows(values, "val_bpb")[3].difference == pytest.approx(-0.15)  # Of the two seeds that both have.


def test_a_comparison_is_resumed_keeps_tokens_equal_and_reports_divergence(tmp_path, monkeypatch, capsys):
    variants = ("base:", "half: --batch_tokens=320", "mad: --optimizer.scale=2")
    real, ran = stages.run, []

    def run(e, stopped):
        ran.append(f"{Path(e.name).parent.name} {e.seed} {e.steps}")
        if "mad" in e.name and e.seed == 1:
            raise Diverged("10 steps in a row were not finite")
        if len(ran) == 3 and "mad" in e.name:
            raise Interrupted("saved")
        return real(e, stopped)

    monkeypatch.setattr(stages, "run", run)
    with pytest.raises(SystemExit) as stop:
        launch.compare.main(flags(tmp_path, *variants))
    assert stop.value.code == 75 and ran == ["base 0 6", "half 0 12", "mad 0 6"]
    found = launch.compare.main(flags(tmp_path, *variants))
    assert ran[3:] == ["mad 0 6", "base 1 6", "half 1 12", "mad 1 6"]
    assert found is not None
    rows = found["variants"]
    assert {row["tokens"] for row in rows.values()} == {3840}
    assert rows["mad"]["verdict"] == "diverged with 1 of 2 seeds" and rows["mad"]["values"][1] is None
    differences = [y - x for x, y in zip(rows["base"]["values"], rows["half"]["values"])]
    assert rows["half"]["difference"] == pytest.approx(statistics.fmean(differences))
    again = launch.compare.main(flags(tmp_path, *variants))
    assert again == found and len(ran) == 7  # Nothing is trained twice.
    report = Path(found["report"]).read_text()
    assert "| half | `--batch_tokens=320` | 12 | 3,840 |" in report and "compare.png" in report
    assert json.loads((tmp_path / "runs/compare/compare.json").read_text())["runs"]["half/seed0"]["tokens"] == 3840
    # The same names with other flags are another comparison.
    with pytest.raises(UserError, match="holds another experiment: optimizer"):
        launch.compare.main(flags(tmp_path, "base:", "half:"))


def test_equal_time_gives_the_faster_variant_more_steps(tmp_path, monkeypatch):
    speeds = {"base": 1000.0, "fast": 2000.0}

    def run(e, stopped):
        kind = next(name for name in speeds if f"/{name}/" in f"/{e.name}/")
        return {"tokens_per_second": speeds[kind], "step": e.steps, "tokens": e.steps * e.batch_tokens, "val_bpb": 1.0}

    monkeypatch.setattr(stages, "run", run)
    found = launch.compare.main([*flags(tmp_path, "base:", "fast: --model.softcap=None"), "--equal=time"])
    assert {name: row["steps"] for name, row in found["variants"].items()} == {"base": 6, "fast": 12}


@pytest.mark.parametrize(
    "variants, match",
    [
        (("base:",), "at least two variants"),
        (("base:", "fast"), "'fast' has no name"),
        (("base:", "base: --steps=3"), "two variants are named 'base'"),
        (("base:", "typo: --optimizer.scael=2"), "variant 'typo': there is no field --optimizer.scael: did you mean"),
        (("base:", "bad: --batch_tokens=100"), "variant 'bad': batch_tokens=100 is not a multiple"),
        (("base:", "open: --name='x"), "variant 'open': No closing quotation"),
    ],
)
def test_a_mistake_is_refused_before_the_first_run(tmp_path, monkeypatch, variants, match):
    monkeypatch.setattr(stages, "run", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(UserError, match=match):
        launch.compare.main(flags(tmp_path, *variants))


def test_a_measure_that_the_stage_does_not_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "run", lambda e, _: {"val_bpb": 1.0, "loss": 2.0, "step": 6})
    with pytest.raises(UserError, match="--measure=accuracy is not a number of this stage's result: choose one of val"):
        launch.compare.main([*flags(tmp_path, "base:", "fast:"), "--measure=accuracy"])
