import json
from pathlib import Path

import pytest

from jaxchat.errors import UserError
from jaxchat.evaluation.curves import draw, read_metrics


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
