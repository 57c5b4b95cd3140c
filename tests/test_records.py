"""Records of evaluations: damaged, kept, of another step, and compared."""

import json
import math
import shutil
from pathlib import Path

import exports
import pytest

import launch.evaluate
from jaxchat import checkpoint
from jaxchat.errors import UserError
from jaxchat.evaluation import evaluate as evaluation
from jaxchat.evaluation.compare import compare
from jaxchat.evaluation.evaluate import merge_results
from jaxchat.evaluation.records import Records
from jaxchat.evaluation.statistics import paired, wilson


@pytest.mark.quick
@pytest.mark.parametrize(
    "line", ["[]", "null", '{"right": true}', '{"index": [1], "right": true}', '{"index": 1}', "{"]
)
def test_damaged_records_are_refused_by_their_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"task":"a"}}\n{line}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 2 is not a record"):
        Records(path, {"task": "a"})
    with pytest.raises(UserError, match="line 2 is not a record"):
        compare(tmp_path, tmp_path)
    path.write_text("5\n")
    with pytest.raises(UserError, match="line 1 is not a record"):
        compare(tmp_path, tmp_path)
    path.write_text('{"task":')
    with pytest.raises(UserError, match="has no records"):
        compare(tmp_path, tmp_path)
    with pytest.raises(UserError, match="choose another with --out"):
        Records(path / "b.jsonl", {})


@pytest.mark.quick
def test_results_of_other_tasks_of_the_same_evaluation_are_kept(tmp_path: Path) -> None:
    path, shares = tmp_path / "results.json", {"centered_v1": 0.5, "centered_v2": 0.25}
    evaluation.merge_results(path, {"step": 1}, {"core/copa": {"accuracy": 0.75, **shares}, "bpb": {"bpb": math.nan}})
    kept = evaluation.merge_results(path, {"step": 1}, {"core/piqa": {"accuracy": 0.75, **shares}})
    assert json.loads(path.read_text()) == {"step": 1, "results": kept}
    assert list(kept) == ["core/copa", "bpb", "core/piqa", "core"] and kept["bpb"] == {"bpb": None}
    assert kept["core"]["tasks"] == 2
    path.write_text(path.read_text()[:-9])
    assert list(evaluation.merge_results(path, {"step": 1}, {"facts": {"accuracy": 1.0}})) == ["facts"]
    assert list(evaluation.merge_results(path, {"step": 2}, {"bpb": {"bpb": 1.0}})) == ["bpb"]


def test_a_step_that_was_trained_again_is_another_evaluation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One morning Mia went out.\n")
    outs, hashes = [], []
    for scale in (0.3, 0.2, 0.3):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        stage = exports.write_run(tmp_path, exports.model(), scale=scale)
        hashes.append(checkpoint.params_hash(Path(stage), 0))
        if len(outs) < 2:
            found = launch.evaluate.main([f"--checkpoint={stage}", "--tasks", f"bpb:{tmp_path}/a.txt", "--slots=1"])
            outs.append(str((found or {})["out"]))
    assert outs[0] != outs[1] and hashes[0] != hashes[1] and outs[0].startswith(f"{stage}/eval/0-")
    (Path(stage) / "sizes.json").unlink(missing_ok=True)
    assert checkpoint.params_hash(Path(stage), 0) == hashes[2], "of the files, where none are recorded"
    path = tmp_path / "mmlu.jsonl"
    Records(path, {"task": "mmlu", "step": 1, "params": hashes[0]}).close()
    with pytest.raises(UserError, match=r"another evaluation \(of other params\): remove it, or set another --out"):
        Records(path, {"task": "mmlu", "step": 1, "params": hashes[1]})
    for place in ("runs/a/sft", "runs/b/sft"):  # A renamed run.
        about = {"task": "mmlu", "step": 1, "params": hashes[0], "checkpoint": place}
        Records(path, about).close()
        kept = merge_results(tmp_path / "results.json", about, {place: {"accuracy": 1.0, "count": 1}})
    assert {"runs/a/sft", "runs/b/sft"} <= kept.keys()


@pytest.mark.quick
def test_evaluations_that_are_not_there_or_judged_by_other_code_are_not_compared(tmp_path: Path) -> None:
    line = '{{"task":"own"}}\n{{"index":0,"right":true,"code":"{}"}}\n'
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.jsonl").write_text(line.format(name))
    (tmp_path / "empty").mkdir()
    a, b = tmp_path / "a", tmp_path / "b"
    for pair, said in {
        (a, tmp_path / "none"): r"none is not a directory: give the directory that launch\.evaluate printed",
        (tmp_path / "none", a): "none is not a directory",
        (a / "own.jsonl", a): r"own\.jsonl is not a directory",
        (a, tmp_path / "empty"): "empty has no records of answers: give the directory",
        (a, b): "other code of the task judged the answers in .*a than those in .*b; run both",
    }.items():
        with pytest.raises(UserError, match=said):
            launch.evaluate.main(["--compare", *map(str, pair)])
    (b / "own.jsonl").write_text(line.format("a"))
    assert compare(a, b)["own"]["difference"] == 0


def test_intervals_and_the_paired_test_are_the_textbooks() -> None:
    assert wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson(10, 10)[1] == 1 and wilson(0, 0) == (0, 1)
    first = [True] * 5 + [False] * 15 + [True] * 30
    second = [False] * 5 + [True] * 15 + [True] * 30
    found = paired(first, second)
    assert (found.only_first, found.only_second, found.difference) == (5, 15, 0.2)
    assert found.p == pytest.approx(0.041389, abs=1e-6)
    assert found.low < 0.2 < found.high
