"""A step looked at again gives the recorded loss to the bit; snapshots show how a run learned."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from documents import corpus, talks, write_rows
from runs import parameters, records

import launch.chat as launch_chat
import launch.inspect as launch_inspect
from jaxchat import checkpoint, command_line, stages
from jaxchat.decode import explain
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.inspection import steps, tables
from jaxchat.loading import load_engine

STEPS = 6


def silent(_: str) -> None:
    pass


def flags(place: Path, stage: str, **changes: object) -> list[str]:
    """A model of one layer of 8, on two devices, two micro-batches a step."""
    suffix = {"pretrain": "", "sft": "chat-"}[stage]
    values = {
        "config": f"configs/tiny.py:{stage}",
        "depth": 1,
        "head_dim": 8,
        "steps": STEPS,
        "batch_tokens": 512,
        "data.vocab": 300,
        "data.row_length": 64,
        "data.workers": 1,
        "micro_rows": 4,
        "mesh.data": 2,
        "save_every": 2,
        "eval_every": 0,
        "eval_rows": 4,
        "keep_params": 3,
        "data.train": place / f"{suffix}train.jsonl",
        "data.val": place / f"{suffix}val.jsonl",
        "data.cache": place / "cache",
        "directory": place / "runs",
        "name": "seen",
    }
    extra = ["--data.epochs", "--tasks"] if stage == "sft" else []
    return [*(f"--{key}={value}" for key, value in (values | changes).items()), *extra, "--prompts"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a pretraining and an SFT stage."""
    place = corpus(tmp_path_factory.mktemp("inspect"))
    write_rows(place / "chat-train.jsonl", talks(80))
    write_rows(place / "chat-val.jsonl", talks(8, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parent.parent)
        for stage in ("pretrain", "sft"):
            stages.run(command_line.load(flags(place, stage)))
    return place / "runs/seen"


def losses(stage: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(stage) if "grad_norm" in record}


def test_snapshots_are_kept_over_the_run_apart_from_the_checkpoints(run: Path) -> None:
    stage = run / "pretrain"
    assert checkpoint.finished_steps(stage) == [4, 6]
    assert checkpoint.readable_steps(stage) == [2, 4, 6]
    assert checkpoint.locate(f"{stage}@2") == (stage, 2) and checkpoint.locate(str(stage)) == (stage, 6)
    assert not (stage / "snapshots/checkpoints/2/rest").exists()
    first, second = (jax.tree.leaves(parameters(stage, step)) for step in (2, 4))
    assert any((a != b).any() for a, b in zip(first, second))
    experiment = checkpoint.read_experiment(stage, Experiment)
    checkpoint.write_experiment(stage / "snapshots", experiment)
    jax.tree.map(np.testing.assert_array_equal, second, jax.tree.leaves(parameters(stage / "snapshots", 4)))


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize(("step", "start"), [(3, 0), (6, 4)])
def test_a_step_computed_again_has_the_recorded_loss(run: Path, stage: str, step: int, start: int) -> None:
    found = steps.look_at_step(run / stage, step, most=3, log=silent)
    assert found["from"] == start and found["equal"] is True and found["changed"] == {}
    assert [one["step"] for one in found["replayed"]] == list(range(start + 1, step + 1))
    assert found["loss"] == losses(run / stage)[step]
    documents = found["documents"]
    assert sum(one["share"] for one in documents) == pytest.approx(1)
    assert [one["share"] for one in documents] == sorted((one["share"] for one in documents), reverse=True)
    own = [loss for one in documents for loss in one["losses"] if loss is not None]
    assert len(own) == sum(one["targets"] for one in documents)
    assert sum(own) / len(own) == pytest.approx(found["loss"], rel=1e-5)
    for one in documents:
        assert len(one["ids"]) == len(one["losses"]) == len(one["names"]) == one["tokens"]
        assert one["losses"][0] is None
    if stage == "pretrain":
        given = {json.loads(line)["text"] for line in (run.parents[1] / "train.jsonl").read_text().splitlines()}
        whole = [
            re.sub(r"<\|bos\|>|\ufffd+$", "", one["text"]) for one in documents if one["text"].startswith("<|bos|>")
        ]
        assert whole and all(any(text in one for one in given) for text in whole)
    else:
        assert any("<|assistant_start|>" in one["text"] for one in documents)


def test_what_cannot_be_looked_at_is_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    for stage, step, most, sentence in (
        ("pretrain", 9, 9, r"there is no step 9 in .*: metrics.jsonl has steps 1 to 6"),
        ("pretrain", 3, 2, r"step 3 is 3 steps from step 0, because no checkpoint .*: allow it with --replay=3"),
        ("pretrain", 6, 1, r"step 6 is 2 steps from checkpoint 4: allow it with --replay=2"),
        ("rl", 1, 9, r"no checkpoint in .*/rl: train first"),
    ):
        with pytest.raises(UserError, match=sentence):
            steps.look_at_step(run / stage, step, most=most, log=silent)
    shutil.copytree(run / "pretrain", tmp_path / "rl")
    value = json.loads((tmp_path / "rl/experiment.json").read_text())
    (tmp_path / "rl/experiment.json").write_text(json.dumps(value | {"stage": "rl"}))
    with pytest.raises(UserError, match="has no rows to look at: its batches were sampled"):
        steps.look_at_step(tmp_path / "rl", 1, most=9, log=silent)


def test_a_moved_run_with_other_records_is_seen_to_differ(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxchat.machine.cores", lambda: 77)
    moved = tmp_path / "elsewhere/moved"
    shutil.copytree(run, moved)
    path = moved / "pretrain/metrics.jsonl"
    wrong = [json.loads(line) for line in path.read_text().splitlines()]
    next(record for record in wrong if record["step"] == 5)["loss"] += 1e-6
    path.write_text("".join(json.dumps(record) + "\n" for record in wrong))
    found = steps.look_at_step(moved / "pretrain", 6, most=2, log=silent)
    assert [one["equal"] for one in found["replayed"]] == [False, True] and found["equal"] is False
    assert list(found["changed"]) == ["processors"] and found["changed"]["processors"][1] == 77


def test_axes_of_one_device_make_no_other_mesh_and_early_checkpoints_record_nothing() -> None:
    now = {"mesh": {"data": 2, "expert": 1}, "jax": "2"}
    assert steps.changed({"mesh": {"data": 2}, "jax": "1"}, now) == {"jax": ["1", "2"]}
    assert steps.changed(None, now) is None


def test_the_same_prompt_is_answered_at_every_kept_step(run: Path) -> None:
    engine = load_engine(str(run / "pretrain"), slots=1)
    ids = [engine.tokenizer.bos, *engine.tokenizer.encode("the fox")]
    found = tables.over_steps(engine, run / "pretrain", ids, ids, SamplingParams(1.0, max_tokens=4))
    assert [one["step"] for one in found] == [2, 4, 6]
    for one in found:
        alone = load_engine(f"{run / 'pretrain'}@{one['step']}", slots=1)
        assert [token["loss"] for token in one["losses"]] == [-s.logprob for s in explain.score(alone, ids)]
    assert len({one["loss"] for one in found}) == 3


def test_launch_inspect_writes_what_launch_chat_explains(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    same = [f"--checkpoint={run / 'pretrain'}", "--prompt=the fox", "--max_tokens=3", "--top_k=5", "--seed=3"]
    told = launch_inspect.main([*same, f"--out={tmp_path}"])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == set(told["files"]) and {"losses.png", "attention-0.json", "arcs-0.png", "checkpoints.png"} <= names
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in names if name.endswith(".png"))
    candidates = json.loads((tmp_path / "candidates.json").read_text())["steps"]
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "200")
    launch_chat.main([*same, "--explain=True"])
    rows = re.findall(r"^[\u2502\u2503] (.*?) [\u2502\u2503]$", capsys.readouterr().out, flags=re.M)
    printed = [[cell.strip() for cell in re.split("[\u2502\u2503]", row)] for row in rows]
    shown = [one for step in candidates[:-1] for one in step]
    assert len(shown) > 7
    table = [row for row in printed if row[0] != "candidate"]
    for row, one in zip(table, shown, strict=True):
        probabilities = (one["probabilities"][name] for name in ("model", "temperature", "top_k", "top_p"))
        assert row[:2] == [one["name"], f"{one['logit']:.3f}"]
        assert row[2:6] == [f"{p:.4f}" if p else "-" for p in probabilities]
        assert row[6] == ("chosen" if one["chosen"] else "")


def test_launch_inspect_writes_a_step(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = launch_inspect.main([f"--run={run / 'sft'}", "--step=6", f"--out={tmp_path}"])
    assert told["equal"] is True and told["loss"] == losses(run / "sft")[6]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(told["files"]) == ["step.json", "step.png"]


def test_launch_inspect_refuses_what_it_cannot_do(run: Path, tmp_path: Path) -> None:
    place = f"--checkpoint={run / 'pretrain'}"
    for given, sentence in (
        ([], "name what to look at"),
        ([place, f"--run={run / 'sft'}"], "name what to look at"),
        ([place], "give --text"),
        ([place, "--text=a", "--prompt=b"], "give --text"),
        ([place, f"--text={'fox saw ' * 40}"], "the text has|longer than|has .* tokens"),
        ([place, "--text=a", "--token=7"], "there is no token 7"),
        ([place, "--text=a", "--step=4"], "set --checkpoint=.*/pretrain@4$"),
        ([f"--run={run / 'sft'}", "--step=1", "--text=a"], "give --checkpoint instead"),
        ([f"--run={run / 'sft'}"], "--step=0 must be at least 1"),
        ([f"{place}@3", "--text=a"], "there are 2, 4, 6"),
    ):
        with pytest.raises(UserError, match=sentence):
            launch_inspect.main([*given, f"--out={tmp_path}"])
