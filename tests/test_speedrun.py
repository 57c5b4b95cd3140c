"""The whole road in one command: it goes on where it stopped, and its report tells what happened."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

import launch.speedrun
from jaxchat import command_line, signals, speedrun, stages
from jaxchat.command_line import stage_arguments
from jaxchat.errors import UserError
from jaxchat.experiment import STAGES
from jaxchat.signals import Interrupted
from jaxchat.stages import starts


@pytest.mark.quick
def test_arguments_go_to_every_stage_or_to_one():
    argv = ["--config=configs/tiny.py", "--seed=3", "--sft:data.train", "a", "b", "--rl:rl.samples=2", "--name=x"]
    assert stage_arguments(argv, "pretrain", STAGES) == ["--config=configs/tiny.py:pretrain", "--seed=3", "--name=x"]
    assert stage_arguments(argv, "sft", STAGES)[2:] == ["--data.train", "a", "b", "--name=x"]
    assert stage_arguments(argv, "rl", STAGES)[2:] == ["--rl.samples=2", "--name=x"]
    assert stage_arguments(["--config", "configs/tiny.py", "--seed", "3"], "rl", STAGES) == [
        "--config=configs/tiny.py:rl",
        "--seed",
        "3",
    ]
    with pytest.raises(UserError, match="runs every stage"):
        stage_arguments(["--config=configs/tiny.py:sft"], "sft", STAGES)


def flags(place: Path) -> list[str]:
    common = {
        "config": "configs/tiny.py",
        "depth": 1,
        "head_dim": 8,
        "batch_tokens": 640,
        "data.vocab": 400,
        "data.row_length": 160,
        "data.workers": 1,
        "micro_rows": 2,
        "mesh.data": 2,
        "save_every": 2,
        "keep_params": 0,
        "eval_every": 2,
        "eval_rows": 4,
        "steps": 2,
        "eval_problems": 4,
        "eval_tokens": 8,
        "directory": place / "runs",
        "pretrain:data.train": "tinyworld:train:150",
        "pretrain:data.val": "tinyworld:val:4",
        "sft:data.train": "tinyworld:chat:60",
        "sft:data.val": "tinyworld:chat:20",
        "rl:rl.prompts": 2,
        "rl:rl.samples": 4,
        "rl:rl.max_tokens": 8,
    }
    return [*(f"--{key}={value}" for key, value in common.items()), "--sft:data.epochs", "--prompts", "Hello!"]


@pytest.mark.quick
@pytest.mark.parametrize("price", ["nan", "inf", "-1", "cheap"])
def test_a_price_that_is_none_is_refused(price):
    with pytest.raises(UserError, match="--dollars_per_hour"):
        launch.speedrun.main(["--config=configs/tiny.py", f"--dollars_per_hour={price}"])


@pytest.mark.slow
def test_the_road_is_gone_once_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    real, ran = stages.run, []

    def run(experiment):
        ran.append(experiment.stage)
        if ran == ["pretrain", "sft", "rl"]:
            raise UserError("the machine went away")
        return real(experiment)

    monkeypatch.setattr(stages, "run", run)
    with pytest.raises(UserError, match="went away"):
        launch.speedrun.main(flags(tmp_path))
    assert not (tmp_path / "runs/tiny/report.md").exists()
    before = starts.read(tmp_path / "runs/tiny/pretrain")
    told = launch.speedrun.main([*flags(tmp_path), "--dollars_per_hour=36"])
    assert ran == ["pretrain", "sft", "rl", "rl"], "what is finished is not run again"
    assert told["pretrain"]["seconds"] == before[0]["seconds"] and told["rl"]["step"] == 2
    text = Path(told["report"]).read_text()
    titles = ("What was trained", "How good it is", "What it says", "What it cost", "Curves")
    for title in ("# tiny", *(f"## {title}" for title in titles), "**Hello!**"):
        assert title in text
    scores = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in text.splitlines() if row.startswith("| ")}
    assert scores[""] == [" after pretrain ", " after sft ", " after rl "]
    strict = scores["arithmetic, strict"]
    assert all(re.fullmatch(r" \d+\.\d% \(\d+\.\d to \d+\.\d\) ", cell) for cell in strict), "of the base model too"
    (bits,) = (cells for name, cells in scores.items() if name.startswith("bits per byte of held-out text, "))
    assert [f" {told[stage]['val_bpb']:.4f} " for stage in STAGES] == bits, (
        "a trial scores no more rows than it trains on"
    )
    known = json.loads((tmp_path / "runs/tiny/speedrun.json").read_text())
    seconds = sum(told[stage]["seconds"] for stage in STAGES) + known["pretrain"]["base_seconds"]
    assert f"| all | {seconds / 60:.1f} | {seconds / 100:.2f} |" in text
    with pytest.raises(UserError, match="holds another experiment: seed was 0 and is now 5"):
        launch.speedrun.main([*flags(tmp_path), "--seed=5"])


def test_a_signal_at_the_end_of_a_stage_is_heard_before_the_next(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    ran = []

    def run(experiment):
        ran.append(experiment.stage)
        experiment.run_directory.mkdir(parents=True, exist_ok=True)
        os.kill(os.getpid(), signal.SIGTERM)
        return {"step": 2}

    monkeypatch.setattr(stages, "run", run)
    road = [command_line.load(stage_arguments(flags(tmp_path), stage, STAGES)) for stage in STAGES]
    with pytest.raises(Interrupted), signals.handled():
        speedrun.run(road, print)
    assert ran == ["pretrain"]
    assert json.loads((tmp_path / "runs/tiny/speedrun.json").read_text())["pretrain"]["finished"]


def test_a_killed_stage_keeps_the_seconds_it_took(tmp_path, monkeypatch):
    """What a kill leaves is what the file says in the middle of a stage; a later start adds its own."""
    monkeypatch.setattr(starts, "CLOCK_SECONDS", 0.05)
    seconds = lambda: [start["seconds"] for start in starts.read(tmp_path)]  # noqa: E731
    with starts.recorded(tmp_path, time.monotonic() - 5):
        time.sleep(0.4)
        first = seconds()
    assert 5.1 <= first[0] <= seconds()[0]
    with starts.recorded(tmp_path, time.monotonic()):
        time.sleep(0.3)
        assert len(seconds()) == 2 and 0.1 <= seconds()[1] < 5
    (tmp_path / "starts.json").write_text("")
    assert starts.read(tmp_path) == []
