import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxchat.errors import UserError
from jaxchat.evaluation.curves import Run, _panel, curve, draw, has_tokens, measures, read_metrics, smooth


def write_run(directory: Path, scores: list[float]) -> Path:
    directory.mkdir(parents=True)
    lines = []
    for step, score in enumerate(scores, 1):
        lines += [{"step": step, "loss": 2 * score, "tokens": 10 * step}, {"step": step, "val_bpb": score}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_a_picture_shows_every_run_and_tells_its_last_score(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / "a", [3.0, 2.0]), write_run(tmp_path / "b", [3.0, 1.5])]
    out = tmp_path / "pictures" / "curves.png"
    assert draw(runs, out) == {str(runs[0]): 2.0, str(runs[1]): 1.5}
    assert out.read_bytes().startswith(b"\x89PNG")


def test_numbers_that_were_not_finite_leave_gaps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "a", [3.0, 2.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step":3,"loss":null,"tokens":30}\n{"step":3,"val_bpb":null}\n')
    assert draw([run], tmp_path / "curves.svg") == {str(run): None}


STAGES = {
    "pretrain": [{"step": 1, "loss": 5.0, "tokens": 10}, {"step": 1, "val_bpb": 1.0, "val_rows": 4}],
    "rl": [{"step": 1, "loss": 0.1, "reward": 0.5}, {"step": 1, "val_bpb": 1.02, "task_strict": 0.1}],
}


def axes_of(groups: dict[str, list[Run]], stage: str, name: str) -> Any:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axis = pyplot.subplots()
    _panel(axis, groups, stage, name)
    pyplot.close(figure)
    return axis


def test_stages_in_one_picture_have_their_own_panels_and_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    for stage, records in STAGES.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "experiment.json").write_text(json.dumps({"stage": stage}))
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    draw([tmp_path / "pretrain", tmp_path / "rl"], tmp_path / "curves.svg")
    panels = [axis for axis in pyplot.gcf().axes if axis.get_visible()]
    monkeypatch.undo()
    pyplot.close("all")
    assert {axis.get_title(): axis.get_xlabel() for axis in panels} == {
        "pretrain: training loss": "training tokens",
        "pretrain: held-out text": "training tokens",
        "rl: held-out text": "step",
        "rl: reward": "step",
        "rl: task, strict": "step",
    }


def test_a_small_change_looks_small_and_shares_reach_from_none_to_all() -> None:
    groups = {"a": [Run("rl", [*STAGES["rl"], {"step": 2, "val_bpb": 1.04, "task_strict": 0.2}])]}
    low, high = axes_of(groups, "rl", "val_bpb").get_ylim()
    assert high - low == pytest.approx(0.52) and low < 1.02 < 1.04 < high
    axis = axes_of(groups, "rl", "task_strict")
    assert axis.get_ylim() == (-0.02, 1.02) and axis.get_ylabel() == "share right"


def test_scores_on_other_rows_are_not_joined_to_the_curve() -> None:
    rows = [64, 64, 226]
    records = [{"step": i, "val_bpb": 1.0 + i, "val_rows": n} for i, n in enumerate(rows, 1)]
    x, _, usual = curve(records, "val_bpb", by_tokens=False)
    assert x.tolist() == [1, 2, 3] and usual.tolist() == [True, True, False]
    axis = axes_of({"a": [Run("", records)]}, "", "val_bpb")
    assert [line.get_xdata().tolist() for line in axis.lines] == [[1, 2], [3]] and "other rows" in axis.get_title()
    assert not has_tokens(records, "val_bpb") and measures({"a": [Run("", records)]}, "") == ["val_bpb"]


def test_a_moving_average_keeps_lines_and_gaps() -> None:
    y = np.arange(200.0)
    np.testing.assert_allclose(smooth(y), y)
    noisy = y + np.where(np.arange(200) % 2, 50.0, -50.0)
    assert np.abs(np.diff(smooth(noisy)))[10:-10].max() < 30
    y[40] = np.nan
    assert np.flatnonzero(np.isnan(smooth(y))).tolist() == [40]
    many = Run("", [{"step": i, "loss": float(i % 5)} for i in range(100)])
    assert [len(line.get_xdata()) for line in axes_of({"a": [many]}, "", "loss").lines] == [100, 100]
    assert len(axes_of({"a": [Run("", many.records[:20])]}, "", "loss").lines) == 2


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    run = write_run(tmp_path / "a", [3.0, 2.0])
    for name in ("curves.xyz", "curves"):
        with pytest.raises(UserError, match=rf"--out=.*{name} is not an image file: use one of the suffixes .*png"):
            draw([run], tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"x\.png cannot be written \(.*\): set another --out"):
        draw([run], tmp_path / "file/x.png")
    assert not pyplot.get_fignums()


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    with pytest.raises(UserError, match="line 2 is not a record"):
        read_metrics(tmp_path)
    for line in ("5", "[]", "null", '{"loss":1}', "\xff"):
        (tmp_path / "metrics.jsonl").write_text(line, encoding="latin-1")
        with pytest.raises(UserError, match="line 1 is not a record"):
            read_metrics(tmp_path)
