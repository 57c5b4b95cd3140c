"""Several processes as one run: equal to one process, whatever happens to one of them."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from documents import corpus
from runs import PATIENCE, ROOT, finish, finish_group, launch, launch_group, parameters, records

from jaxchat import checkpoint, processes, sharding
from jaxchat.errors import UserError
from jaxchat.sharding import Mesh, make_mesh

HAND = {processes.ADDRESS: "host:1234", processes.COUNT: "2", processes.INDEX: "1"}
LONG = 10_000  # Steps of a run that something ends.
LETTERS = """
from jaxchat.tasks import Problem, Score

class Letters:
    name, tools = "letters", ()

    def problems(self, split):
        return [Problem.ask(f"word {i}", "") for i in range(20)]

    def score(self, problem, text):
        return Score(len(text) % 2 == 0, "a" in text)
"""


def test_a_group_is_known_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "tpu_hosts", lambda environment: 1)
    assert not processes.grouped({})
    assert processes.grouped(HAND)
    assert processes.grouped({"SLURM_STEP_NUM_TASKS": "4"}) and not processes.grouped({"SLURM_STEP_NUM_TASKS": "1"})
    assert processes.grouped({"OMPI_COMM_WORLD_SIZE": "2"})
    assert processes.grouped({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"})
    assert not processes.grouped({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    monkeypatch.setattr(processes, "tpu_hosts", lambda environment: 2)
    assert processes.grouped({})
    cluster = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1", "SLURM_STEP_NUM_TASKS": "4"}
    assert processes.grouped(cluster) and not processes.grouped(cluster | {processes.COUNT: "1"}), "independent pods"
    with pytest.raises(UserError, match="is set without"):
        processes.grouped(cluster | {processes.COUNT: "2"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({processes.COUNT: ""}, "is set without JAX_NUM_PROCESSES"),
        ({processes.ADDRESS: ""}, "is set without JAX_COORDINATOR_ADDRESS"),
        ({processes.INDEX: "2"}, "JAX_PROCESS_ID=2 is invalid with JAX_NUM_PROCESSES=2"),
        ({processes.INDEX: "-1"}, "number the processes from 0"),
        ({processes.ADDRESS: "host"}, "as HOST:PORT"),
    ],
)
def test_half_a_group_is_refused(changes: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        processes.grouped(HAND | changes)


def test_alone_nothing_is_asked_of_others(tmp_path: Path) -> None:
    agreed = processes.Agreement()
    assert agreed(True) is True and agreed(False) is False
    assert processes.gather([1]) == [[1]]
    assert processes.share_out("abc", lambda part: [item * 2 for item in part]) == ["aa", "bb", "cc"]
    processes.check_same("it", 1, "")
    processes.check_shared(tmp_path, "--directory")
    with pytest.raises(ValueError, match="mine"):
        processes.everyone(lambda: (_ for _ in ()).throw(ValueError("mine")))


def test_work_is_shared_out_and_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    items, parts = list(range(7)), []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(processes, "gather", lambda own: parts)
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append([item * 10 for item in items[index::3]])
        if index == 2:
            assert processes.share_out(items, lambda own: [item * 10 for item in own]) == [n * 10 for n in items]


def test_no_size_is_sent_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX makes 32 bits of a 64-bit integer, too few for the bytes of a large value."""
    sent: list[np.ndarray] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "barrier", lambda: None)
    send = lambda x: sent.append(x) or np.stack([x, x])  # noqa: E731
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", send)
    assert processes.gather("words") == ["words"] * 2
    assert [(x.dtype, x.nbytes) for x in sent] == [(np.uint8, 8), (np.uint8, sent[1].size)]


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(8, 1, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4)])
def test_the_rows_of_a_process_are_those_of_its_devices(data: int, fsdp: int, tensor: int) -> None:
    mesh = make_mesh(Mesh(data, fsdp, tensor), rows=16)
    assert sharding.own_rows(mesh, 16) == list(range(16))
    batch = {"tokens": np.arange(2 * 16 * 3).reshape(2, 16, 3)}
    for put in (sharding.put_batch, sharding.put_whole):
        np.testing.assert_array_equal(np.asarray(put(mesh, batch)["tokens"]), batch["tokens"])


def flags(place: Path, stage: str, name: str, **changes: object) -> list[str]:
    """A model of one layer, on eight devices."""
    values = {
        "config": f"configs/tiny.py:{stage}",
        "depth": 1,
        "head_dim": 8,
        "family": "july2026",  # Low rates, so that roundings do not grow: sums over processes are in another order.
        "steps": 20,
        "batch_tokens": 16 * 96,
        "data.vocab": 300,
        "data.row_length": 96,
        "data.workers": 1,
        "micro_rows": 8,
        "mesh.data": 4,
        "mesh.fsdp": 2,
        "save_every": 10,
        "keep_params": 2,
        "eval_every": 10,
        "eval_rows": 8,
        "data.cache": place / "cache",
        "directory": place / "runs",
        "name": name,
    }
    if stage == "pretrain":
        values |= {"data.train": place / "train.jsonl", "data.val": place / "val.jsonl"}
    else:
        values |= {"eval_problems": 6, "eval_tokens": 8, "tasks": "arithmetic"}
    if stage == "sft":
        values |= {"data.train": "tinyworld:chat:60", "data.val": "tinyworld:chat:20", "steps": 4, "save_every": 2}
    if stage == "rl":
        values |= {"rl.prompts": 4, "rl.samples": 4, "rl.max_tokens": 8, "steps": 4}
        values |= {"rl.tasks": f"{place / 'letters.py'}:Letters"}
        values |= {"start_from": "sft", "save_every": 2, "eval_every": 2, "rl.kl": 0.1}
    extra = ["--data.epochs"] if stage == "sft" else []
    extra += ["--tasks"] if stage == "pretrain" else []
    return [*(f"--{key}={value}" for key, value in (values | changes).items()), *extra]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = corpus(tmp_path_factory.mktemp("processes"))
    (place / "letters.py").write_text(LETTERS)
    return place


def assert_close(stage: Path, other: Path) -> None:
    """The same losses and scores to 1e-5, and parameters to the little that Adam makes of a rounding: devices of
    several processes add in another order."""
    ours, theirs = records(stage), records(other)
    assert [sorted(record) for record in ours] == [sorted(record) for record in theirs] and len(ours) > 2
    for one, two in zip(ours, theirs):
        for name, value in one.items():
            loose = name in ("grad_norm",) or name.startswith(("gap", "kl"))
            assert two[name] == pytest.approx(value, rel=1e-3 if loose else 1e-5, abs=1e-5), (one["step"], name)

    here, there = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(parameters(place))]) for place in (stage, other)
    )
    assert np.linalg.norm(here - there) <= 1e-3 * np.linalg.norm(here)


@pytest.mark.slow
def test_two_processes_train_and_are_scored_as_one(place: Path) -> None:
    """Pretraining, SFT with its tasks, RL and an evaluation; the first is taken up again by one process."""
    told: dict[str, dict[str, dict]] = {"one": {}, "two": {}}
    for stage in ("pretrain", "sft", "rl"):
        out, _ = finish(launch(*flags(place, stage, "one")))
        told["one"][stage] = json.loads(out.splitlines()[-1])
        (out, err), (silent, _) = finish_group(launch_group(2, *flags(place, stage, "two")))
        told["two"][stage] = json.loads(out.splitlines()[-1])
        assert "warning" not in err and "{" not in silent, "the second process tells no result"
        assert_close(place / "runs/one" / stage, place / "runs/two" / stage)
        for name in ("samples.md", "experiment.json"):
            one, two = ((place / "runs" / run / stage / name).read_text() for run in ("one", "two"))
            assert one.replace('"one"', '"two"') == two
    scores = {}
    for name, count in (("one", 1), ("two", 2)):
        checkpoint_of = f"--checkpoint={place}/runs/one/rl"
        asked = ["--tasks", "arithmetic", "facts", "bpb", "--limit=9", "--max_tokens=8", f"--out={place}/ev/{name}"]
        (out, _), *_ = finish_group(launch_group(count, checkpoint_of, *asked, program="launch.evaluate"))
        scores[name] = json.loads(out.splitlines()[-1])
        assert scores[name].pop("out") == f"{place}/ev/{name}"
    assert scores["one"]["bpb"].pop("bpb") == pytest.approx(scores["two"]["bpb"].pop("bpb"), rel=1e-5)
    assert scores["one"] == scores["two"]
    kept = [(place / "ev" / name / "arithmetic.jsonl").read_text() for name in ("one", "two")]
    assert kept[0] == kept[1] and len(kept[0].splitlines()) == 10
    # What two processes saved, one goes on with.
    copy = Path(shutil.copytree(place / "runs/two", place / "moved/two"))
    shutil.rmtree(copy / "pretrain/checkpoints/20")
    _, err = finish(launch(*flags(place, "pretrain", "two", directory=place / "moved")))
    assert "continuing from step 10" in err
    assert_close(copy / "pretrain", place / "runs/one/pretrain")


def began(group: list, stage: Path) -> None:
    """Returns once a run has taken some steps."""
    path = stage / "metrics.jsonl"
    while all(process.poll() is None for process in group):
        if path.exists() and '"step":3,' in path.read_text():
            return
        time.sleep(0.05)
    finish_group(group)
    raise AssertionError("the run ended before it was stopped")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_checkpoint(place: Path) -> None:
    stage = place / "runs/stopped/pretrain"
    for which in (1, 0):
        group = launch_group(2, *flags(place, "pretrain", "stopped", steps=LONG, save_every=LONG, eval_every=0))
        began(group, stage)
        group[which].send_signal(signal.SIGTERM)
        told = finish_group(group, [75, 75])
        assert all("stopped by a signal; saved: start again to continue" in err for _, err in told)
        assert "Traceback" not in told[0][1] + told[1][1]
        (saved,) = checkpoint.finished_steps(stage)
        assert records(stage)[-1]["step"] == saved
        assert json.loads((stage / "sizes.json").read_text()).keys() == {str(saved)}
        shutil.rmtree(stage)


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_fewer_go_on(place: Path) -> None:
    changes = {"save_every": 2, "eval_every": 0, "keep": 9}
    for name, lose, said in (("killed", signal.SIGKILL, "is lost"), ("silent", signal.SIGSTOP, "process 1 is lost")):
        stage = place / f"runs/{name}/pretrain"
        group = launch_group(2, *flags(place, "pretrain", name, **changes, steps=LONG))
        began(group, stage)
        start = time.monotonic()
        group[1].send_signal(lose)
        try:
            ((_, err),) = finish_group(group[:1], [75])
        finally:
            group[1].kill()
            group[1].communicate()
        assert said in err and "start all again to continue" in err and "Traceback" not in err
        assert time.monotonic() - start < 60
    saved = checkpoint.finished_steps(stage)[-1]
    finish(launch(*flags(place, "pretrain", name, **changes, steps=saved + 2)))
    assert records(stage)[-1]["step"] == saved + 2


UNLUCKY = """
import os, time
from jaxchat import checkpoint, integrity, launcher, processes
from launch.train import main

measure, read = integrity.measure, checkpoint.Checkpoints._read

def slow(directory):
    time.sleep(float(os.environ.get("HASH_SECONDS", 0)))
    return measure(directory)

def fails(self, step, abstract):
    if processes.jax.process_index() == 1 and step == max(self.steps()):
        raise ValueError("Stale file handle")
    return read(self, step, abstract)

integrity.measure, checkpoint.Checkpoints._read = slow, fails
launcher.run(main)
"""


@pytest.mark.slow
def test_a_slow_hash_is_waited_for_and_what_one_cannot_read_all_pass_over(place: Path) -> None:
    (place / "unlucky.py").write_text(UNLUCKY)
    stage, unlucky = place / "runs/unlucky/pretrain", {"program": "unlucky", "PYTHONPATH": f"{place}{os.pathsep}{ROOT}"}
    slow = unlucky | {"HASH_SECONDS": str(PATIENCE + 4)}
    group = launch_group(2, *flags(place, "pretrain", "unlucky", steps=LONG, save_every=LONG, eval_every=0), **slow)
    began(group, stage)
    group[1].send_signal(signal.SIGTERM)
    finish_group(group, [75, 75])
    (saved,) = checkpoint.finished_steps(stage)
    assert json.loads((stage / "sizes.json").read_text()).keys() == {str(saved)}
    changes = {"save_every": LONG, "eval_every": 0}
    finish(launch(*flags(place, "pretrain", "unlucky", steps=saved + 2, **changes)))
    assert checkpoint.finished_steps(stage) == [saved, saved + 2]
    told = finish_group(launch_group(2, *flags(place, "pretrain", "unlucky", steps=saved + 4, **changes), **unlucky))
    assert f"warning: checkpoint {saved + 2} in" in told[0][1] and "(Stale file handle)" in told[0][1]
    assert f"continuing from step {saved}" in told[0][1]
    assert checkpoint.finished_steps(stage) == [saved, saved + 4]
    assert records(stage)[-1]["step"] == saved + 4


@pytest.mark.slow
def test_what_one_process_refuses_ends_all(place: Path, tmp_path: Path) -> None:
    """Its directory is not that of the others."""
    own = [[f"--directory={tmp_path}/{index}"] for index in range(2)]
    told = finish_group(launch_group(2, *flags(place, "pretrain", "apart"), own=own), [2, 2])
    assert all("is not the same directory for every process" in err for _, err in told)


def test_a_timeout_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (HAND | {processes.TIMEOUT: "soon"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="JAXCHAT_HEARTBEAT_TIMEOUT=soon is not a number"), processes.joined():
        pass


def test_a_new_run_has_not_agreed_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.Agreement, "stopping", True)
    processes.Agreement()
    assert not processes.Agreement.stopping


def test_an_error_that_comes_of_a_lost_process_is_known() -> None:
    lost, full = (jax.errors.JaxRuntimeError(text) for text in ("UNKNOWN: Gloo", "RESOURCE_EXHAUSTED: no memory"))
    told = UserError("the checkpoint could not be written")
    assert not processes._broken(told) and not processes._broken(full)
    told.__cause__ = lost
    assert processes._broken(lost) and processes._broken(told)


def test_hosts_with_other_documents_are_told_to_use_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("what --data.train names", ["a"], "give every host the same documents")
    monkeypatch.setattr(processes, "gather", lambda value: [value, ["b"]])
    with pytest.raises(UserError, match=r"--data.train names is not the same in every process: give every host the"):
        processes.check_same(*given)
    monkeypatch.setattr(processes, "gather", lambda value: [value, ["a"]])
    processes.check_same(*given)
