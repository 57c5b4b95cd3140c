"""A run that was stopped, however, ends as one that was not."""

import json
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from documents import corpus
from runs import assert_same_end, finish, launch, records, send_at

from jaxchat import checkpoint, command_line, sharding, stages

STEPS, SAVE_EVERY = 40, 5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("resume"))


def flags(place, name, **changes):
    """A model of one layer of 8, on two devices, two micro-batches a step."""
    values = {
        "config": "configs/tiny.py",
        "depth": 1,
        "head_dim": 8,
        "steps": STEPS,
        "batch_tokens": 128,
        "data.vocab": 300,
        "data.row_length": 16,
        "data.workers": 1,
        "micro_rows": 4,
        "mesh.data": 2,
        "save_every": SAVE_EVERY,
        "keep_params": 0,
        "eval_every": 10,
        "eval_rows": 8,
        "data.train": place / "train.jsonl",
        "data.val": place / "val.jsonl",
        "data.cache": place / "cache",
        "directory": place / "runs",
        "name": name,
    }
    return [*(f"--{key}={value}" for key, value in (values | changes).items()), "--prompts"]


def start(place, name, **changes):
    return launch(*flags(place, name, **changes))


@pytest.fixture(scope="module")
def uninterrupted(place):
    out, _ = finish(start(place, "whole"))
    stage = place / "runs/whole/pretrain"
    told = json.loads(out.splitlines()[-1])
    assert told["step"] == STEPS and told["checkpoint"] == str(stage)
    return stage


def test_the_last_line_has_the_keys_that_scripts_read(place, uninterrupted):
    out, err = finish(start(place, "whole"))
    told = json.loads(out.splitlines()[-1])
    keys = {"stage", "step", "tokens", "loss", "val_bpb", "tokens_per_second", "mfu", "compile_seconds", "checkpoint"}
    assert keys <= set(told)
    assert f"continuing from step {STEPS}" in err
    assert told["val_bpb"] == [line["val_bpb"] for line in records(uninterrupted) if "val_bpb" in line][-1]
    assert len({json.dumps(line) for line in records(uninterrupted)}) == len(records(uninterrupted))


def test_killed_runs_end_as_an_uninterrupted_one(place, uninterrupted):
    stage = place / "runs/killed/pretrain"
    chosen = random.Random(8)
    for step in (chosen.randint(1, 14), chosen.randint(16, 29)):
        process = start(place, "killed")
        send_at(process, stage / "metrics.jsonl", step, signal.SIGKILL)
        finish(process, -signal.SIGKILL)
        with (stage / "metrics.jsonl").open("a") as file:
            file.write('{"step":3,"loss":5.')  # What a full buffer leaves when a machine goes down.
    finish(start(place, "killed"))
    assert_same_end(stage, uninterrupted)


def test_a_signal_saves_and_exits_with_75_and_the_run_goes_on(place, uninterrupted):
    stage = place / "runs/stopped/pretrain"
    process = start(place, "stopped")
    send_at(process, stage / "metrics.jsonl", 12, signal.SIGTERM)
    out, err = finish(process, 75)
    assert out == "" and "start again to continue" in err and "Traceback" not in err
    saved = checkpoint.finished_steps(stage)[-1]
    assert 12 <= saved < STEPS and records(stage)[-1]["step"] == saved
    _, err = finish(start(place, "stopped"))
    assert f"continuing from step {saved}" in err
    assert_same_end(stage, uninterrupted)


def run(place, name, **changes):
    """One stage in this process, on as many of its eight devices as the mesh takes."""
    argv = flags(
        place, name, **{"steps": 6, "save_every": 2, "eval_every": 0, "batch_tokens": 256, "micro_rows": 8} | changes
    )
    return stages.run(command_line.load(argv))


@pytest.fixture
def seen(monkeypatch):
    """The tokens of every training batch that goes to the devices, as (rows, length)."""
    batches = []
    put = sharding.put_batch

    def note(mesh, batch):
        batches.append(np.asarray(batch["tokens"]).reshape(-1, batch["tokens"].shape[-1]))
        return put(mesh, batch)

    monkeypatch.setattr(sharding, "put_batch", note)
    return batches


def losses(stage):
    return {line["step"]: line["loss"] for line in records(stage) if "loss" in line}


def moved(stage, directory):
    """A copy of a run directory elsewhere, as if it had been saved at step 4."""
    copy = Path(shutil.copytree(stage.parent, directory / stage.parent.name)) / stage.name
    shutil.rmtree(copy / "checkpoints/6")
    return copy


MESHES = {
    1: {"mesh.data": 1},
    2: {"mesh.data": 1, "mesh.tensor": 2},
    4: {"mesh.data": 2, "mesh.fsdp": 2, "micro_rows": 16},
}


@pytest.mark.slow
def test_a_run_of_eight_devices_goes_on_with_one_two_and_four(place, tmp_path, seen):
    sizes = {"head_dim": 4, "keep": 3}
    run(place, "eight", **sizes, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    stage = place / "runs/eight/pretrain"
    whole = list(seen)
    for devices, mesh in MESHES.items():
        copy = moved(stage, tmp_path / str(devices))
        seen.clear()
        run(place, "eight", **(sizes | mesh), directory=tmp_path / str(devices))
        np.testing.assert_array_equal(seen[:2], whole[4:6])
        assert losses(copy) == pytest.approx(losses(stage), rel=1e-5), devices


def test_a_truncated_checkpoint_costs_its_steps_and_nothing_else(place, tmp_path, capsys):
    run(place, "whole6", **{"mesh.data": 1})
    stage = place / "runs/whole6/pretrain"
    copy = Path(shutil.copytree(stage.parent, tmp_path / "whole6")) / "pretrain"
    largest = max((copy / "checkpoints/6").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    run(place, "whole6", **{"mesh.data": 1, "directory": tmp_path})
    err = capsys.readouterr().err
    assert "warning: checkpoint 6 in" in err and "trying an older one" in err and "continuing from step 4" in err
    assert_same_end(copy, stage)
