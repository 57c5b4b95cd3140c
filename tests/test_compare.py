"""Variants are trained with the same seeds, resumed after a kill, and compared seed by seed."""

import dataclasses
import json
import math
import shutil
import statistics
from pathlib import Path

import pytest

import launch.compare
from jaxchat import checkpoint, command_line, comparison, serialization, stages
from jaxchat.errors import UserError
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


def chat_flags(place, *variants):
    argv = flags(place, *variants, config="configs/tiny.py:sft", steps=0)
    return [word for word in argv if not word.startswith(("--data.train", "--data.val"))]


def trained(e):
    """What a run leaves behind, and its result, made up."""
    checkpoint.write_experiment(e.stage_directory, e)
    loss = 1 + 0.1 * e.seed + 0.01 * e.batch_tokens / e.steps
    (e.stage_directory / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "tokens": 640}) + "\n")
    return {"step": e.steps, "tokens": e.steps * e.batch_tokens, "tokens_per_second": 9.5, "val_bpb": loss}


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
    verdicts = {row.name: row.verdict for row in comparison.rows(values, lower=True)}
    assert verdicts == {
        "base": "baseline",
        "lower": "better",
        "same": "undecided",
        "lost": "diverged with 1 of 3 seeds",
    }
    assert {row.name: row.verdict for row in comparison.rows(values, lower=False)}["lower"] == "worse"
    assert comparison.rows({"base": [1.0], "one": [0.5]}, lower=True)[1].verdict == "undecided"
    assert comparison.rows(values, lower=True)[3].difference == pytest.approx(-0.15)  # Of the two seeds that both have.


def test_the_direction_of_a_measure_is_known_or_refused():
    assert [comparison.lower_is_better(name) for name in ("val_bpb", "arithmetic_strict", "core")] == [
        True,
        False,
        False,
    ]
    with pytest.raises(UserError, match="--measure=accuracy: it is not known which direction is better"):
        comparison.lower_is_better("accuracy")


def test_a_comparison_is_resumed_keeps_tokens_equal_and_reports_divergence(tmp_path, monkeypatch, capsys):
    variants = ("base:", "half: --batch_tokens=320", "mad: --optimizer.scale=2")
    ran = []

    def run(e):
        ran.append(f"{Path(e.name).parent.name} {e.seed} {e.steps}")
        if "mad" in e.name and e.seed == 1:
            checkpoint.write_experiment(e.stage_directory, e)
            raise Diverged("10 steps in a row were not finite")
        if len(ran) == 3 and "mad" in e.name:
            raise Interrupted("saved")
        return trained(e)

    monkeypatch.setattr(stages, "run", run)
    with pytest.raises(Interrupted):
        launch.compare.main(flags(tmp_path, *variants))
    assert ran == ["base 0 6", "half 0 12", "mad 0 6"]
    found = launch.compare.main(flags(tmp_path, *variants))
    assert ran[3:] == ["mad 0 6", "base 1 6", "half 1 12", "mad 1 6"]
    assert found is not None
    rows = found["variants"]
    assert {row["tokens"] for row in rows.values()} == {3840}
    assert rows["mad"]["verdict"] == "diverged with 1 of 2 seeds" and rows["mad"]["values"][1] is None
    assert rows["mad"]["unstable_steps"] is None  # Not 0: it is not known.
    differences = [y - x for x, y in zip(rows["base"]["values"], rows["half"]["values"])]
    assert rows["half"]["difference"] == pytest.approx(statistics.fmean(differences))
    again = launch.compare.main(flags(tmp_path, *variants))
    assert again == found and len(ran) == 7  # Nothing is trained twice.
    report = Path(found["report"]).read_text()
    assert "| better | 12 | 3,840 |" in report and "- half: `--batch_tokens=320`" in report
    assert "- mad diverged: 10 steps in a row were not finite" in report and "![curves of the variants]" in report
    assert json.loads((tmp_path / "runs/compare/compare.json").read_text())["half/seed0"]["tokens"] == 3840
    # The same names with other flags are another comparison, also where a run could be resumed with them.
    with pytest.raises(UserError, match="holds another experiment: optimizer"):
        launch.compare.main(flags(tmp_path, "base:", "new:", "half:"))
    with pytest.raises(UserError, match="holds another experiment: micro_rows was 2 and is now 1"):
        launch.compare.main(flags(tmp_path, "base: --micro_rows=1", "half: --batch_tokens=320"))
    assert len(ran) == 7  # Before anything is trained.
    # A run whose directory was removed, as that message says, is trained again.
    shutil.rmtree(tmp_path / "runs/compare/half/seed0")
    shutil.rmtree(tmp_path / "runs/compare/half/seed1")
    assert launch.compare.main([*flags(tmp_path, "base:", "half: --steps=2")])["variants"]["half"]["steps"] == 2
    assert ran[7:] == ["half 0 2", "half 1 2"]
    for text in ("{", "[]"):
        (tmp_path / "runs/compare/compare.json").write_text(text)
        with pytest.raises(UserError, match=r"compare\.json cannot be read"):
            launch.compare.main(flags(tmp_path, *variants))


def test_variants_are_really_trained_from_the_same_start(tmp_path):
    """Twice the same variant gives the same number, another one not; the result is a line of the launcher's."""
    argv = flags(tmp_path, "base:", "same: --save_every=3", "fast: --optimizer.scale=3")
    found = launch.compare.main([*argv, "--seeds", "0"])
    base, same, fast = (found["variants"][name]["values"][0] for name in ("base", "same", "fast"))
    assert base == same != fast
    assert (tmp_path / "runs/compare/compare.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(serialization.json_line(found))["variants"]["fast"]["verdict"] == "undecided"


def test_equal_time_gives_the_faster_variant_more_steps(tmp_path, monkeypatch):
    speeds, trials = {"base": 1000.0, "fast": 2000.0, "mad": None}, []

    def run(e):
        checkpoint.write_experiment(e.stage_directory, e)
        kind = next(name for name in speeds if f"/{name}/" in f"/{e.name}/")
        if "/speed/" in e.name:
            trials.append(kind)
            if speeds[kind] is None:
                raise Diverged("not finite")
            return {"tokens_per_second": speeds[kind]}
        return {"step": e.steps, "tokens": e.steps * e.batch_tokens, "val_bpb": 1.0}

    monkeypatch.setattr(stages, "run", run)
    variants = ("base:", "fast: --model.softcap=None", "mad: --optimizer.scale=2")
    found = launch.compare.main([*flags(tmp_path, *variants), "--equal=time"])
    assert {name: row["steps"] for name, row in found["variants"].items()} == {"base": 6, "fast": 12, "mad": 6}
    assert launch.compare.main([*flags(tmp_path, *variants), "--equal=time"]) == found
    assert trials == ["base", "fast", "mad"]  # Speeds are kept.
    with pytest.raises(UserError, match="--equal=time needs the speed of 'mad', which diverged: not finite"):
        launch.compare.main([*flags(tmp_path / "first", variants[2], variants[0]), "--equal=time"])
    with pytest.raises(UserError, match="--equal=time needs a fixed number of steps"):
        launch.compare.main([*chat_flags(tmp_path, "base:", "low: --optimizer.scale=0.1"), "--equal=time"])


def test_a_later_stage_is_resumed_with_what_it_took_from_the_checkpoint(tmp_path, monkeypatch):
    """Model, vocabulary and steps of SFT come from elsewhere, so experiment.json differs from the configuration."""
    ran = []

    def run(e):
        ran.append(e.name)
        taken, _ = inherited(e)
        checkpoint.write_experiment(e.stage_directory, dataclasses.replace(taken, steps=e.steps or 9))
        return {"step": 9, "tokens": 9, "val_bpb": 1.0}

    start = command_line.load([*flags(tmp_path)[:-4], "--depth=2", "--name=start"])
    inherited = lambda e: (dataclasses.replace(e, model=start.model, depth=2), None)  # noqa: E731
    monkeypatch.setattr(stages, "run", run)
    monkeypatch.setattr(comparison, "inherited", inherited)
    argv = chat_flags(tmp_path, "base:", "low: --optimizer.scale=0.1")
    first = launch.compare.main(argv)
    assert launch.compare.main(argv) == first and len(ran) == 4


def test_a_later_stage_under_the_same_names_is_not_taken_for_the_first(tmp_path, monkeypatch):
    def run(e):
        checkpoint.write_experiment(e.stage_directory, e)
        if e.stage == "sft" and e.seed:
            raise Diverged("not finite")
        return {"stage": e.stage, "step": 6, "tokens": 9, "val_bpb": {"pretrain": 1.0, "sft": 2.0}[e.stage]}

    monkeypatch.setattr(stages, "run", run)
    monkeypatch.setattr(comparison, "inherited", lambda e: (e, None))
    base, sft = (make(tmp_path, "base:", "low: --optimizer.scale=0.1") for make in (flags, chat_flags))
    for argv, values in ((base, [1.0, 1.0]), (sft, [2.0, None]), (base, [1.0, 1.0])):
        assert launch.compare.main(argv)["variants"]["low"]["values"] == values


@pytest.mark.parametrize(
    "variants, match",
    [
        (("base:",), "at least two variants"),
        (("base:", "fast"), "'fast' has no name"),
        (("base:", "base: --steps=3"), "two variants are named 'base'"),
        (("base:", "typo: --optimizer.scael=2"), "variant 'typo': unknown field --optimizer.scael: did you mean"),
        (("base:", "bad: --batch_tokens=100"), "variant 'bad': batch_tokens=100 is not a multiple"),
        (("base:", "open: --steps='5"), "variant 'open': No closing quotation"),
        (("base:", "mine: --seed=7"), "variant 'mine': --seed=7 cannot differ between variants"),
        (("base:", "help: --help"), "variant 'help': --help cannot differ between variants"),
    ],
)
def test_a_mistake_is_refused_before_the_first_run(tmp_path, monkeypatch, variants, match):
    monkeypatch.setattr(stages, "run", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(UserError, match=match):
        launch.compare.main(flags(tmp_path, *variants))


@pytest.mark.parametrize(
    "more, match",
    [
        (["--seeds", "0", "99999999999"], "seed=99999999999 must lie between"),
        (["--seeds", "0", "0"], "none twice"),
        (["--seed=3"], "with each of --seeds; leave --seed out"),
        (["--optimizer.scael=2"], "^unknown field --optimizer.scael"),
        (["--measure=lost"], "--measure=lost: it is not known"),
    ],
)
def test_a_mistake_outside_the_variants_is_refused_before_the_first_run(tmp_path, monkeypatch, more, match):
    monkeypatch.setattr(stages, "run", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(UserError, match=match):
        launch.compare.main([*flags(tmp_path, "base:", "fast:"), *more])


def test_a_measure_that_the_stage_does_not_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "run", lambda e: {"val_bpb": 1.0, "loss": 2.0, "step": 6})
    with pytest.raises(UserError, match="--measure=gsm8k_strict is not a number of this stage's result: choose one of"):
        launch.compare.main([*flags(tmp_path, "base:", "fast:"), "--measure=gsm8k_strict"])
