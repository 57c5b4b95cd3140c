"""SFT and RL: where they start, what they are scored on, and that a run which was stopped ends as one that was not."""

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from runs import assert_same_end, finish, launch, parameters, records, send_at

import launch.evaluate as launch_evaluate
from jaxchat import checkpoint, command_line, stages
from jaxchat.data.streams import Rows
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.stages import running
from jaxchat.stages.scores import rows_to_score


def flags(place: Path, stage: str, name: str = "road", **changes) -> list[str]:
    """A model of one layer, which knows little."""
    values = {
        "config": f"configs/tiny.py:{stage}",
        "depth": 1,
        "head_dim": 8,
        "steps": 4,
        "batch_tokens": 640,
        "data.vocab": 400,
        "data.row_length": 160,
        "data.workers": 1,
        "data.cache": place / "cache",
        "micro_rows": 2,
        "mesh.data": 2,
        "save_every": 2,
        "keep_params": 0,
        "eval_every": 4,
        "eval_rows": 4,
        "directory": place / "runs",
        "name": name,
    }
    if stage != "rl":
        values["data.train"] = "tinyworld:train:150" if stage == "pretrain" else "tinyworld:chat:60"
        values["data.val"] = "tinyworld:val:20" if stage == "pretrain" else "tinyworld:chat:20"
    if stage != "pretrain":
        values |= {"eval_problems": 4, "eval_tokens": 8}
    if stage == "rl":
        values |= {"rl.prompts": 2, "rl.samples": 4, "rl.max_tokens": 8, "rl.epochs": 2, "rl.objective": "ppo"}
        values |= {"rl.kl": 0.1, "rl.rewards": "brevity", "start_from": "pretrain"}
    given = values | changes
    extra = ["--data.epochs"] if stage == "sft" else []
    extra += ["--tasks"] if "tasks" not in given else []  # Their answers take longer than the rest.
    return [*(f"--{key}={value}" for key, value in given.items()), *extra, "--prompts"]


def run(place: Path, stage: str, name: str = "road", **changes) -> dict:
    """One stage in this process."""
    return stages.run(command_line.load(flags(place, stage, name, **changes)))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run whose base model is trained."""
    place = tmp_path_factory.mktemp("road")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parent.parent)
        run(place, "pretrain")
    return place


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)


def renamed(place: Path, name: str) -> Path:
    """Another run with the same base model."""
    return Path(shutil.copytree(place / "runs/road/pretrain", place / f"runs/{name}/pretrain")).parent


def with_base(place: Path, name: str) -> Path:
    directory = renamed(place, name)
    shutil.copytree(place / "runs/road/tokenizer", directory / "tokenizer")
    return directory


def test_fine_tuning_starts_from_the_base_model_and_tells_what_it_forgets(place):
    directory = with_base(place, "tuned")
    told = run(place, "sft", "tuned", tasks="arithmetic", eval_samples=2)
    first, *_ = records(directory / "sft")
    base = [line["val_bpb"] for line in records(directory / "pretrain") if "val_bpb" in line][-1]
    assert first["step"] == 0 and first["val_bpb"] == pytest.approx(base, rel=1e-6) == told["val_bpb_before"]
    assert told["val_loss"] < told["val_loss_before"] and "arithmetic_strict" in told
    assert all(0 <= told[f"arithmetic_{kind}"] <= told[f"arithmetic_{kind}_pass@2"] for kind in ("strict", "lenient"))
    assert told["stage"] == "sft" and json.loads((directory / "rows/sft-train.json").read_text())
    assert (directory / "sft/samples.md").exists() is False, "no prompts were asked for"
    start = jax.tree.leaves(parameters(directory / "pretrain"))
    assert any((a != b).any() for a, b in zip(start, jax.tree.leaves(parameters(directory / "sft"))))


def test_questions_are_scored_at_intervals_as_launch_evaluate_scores_them(place):
    """A base model is asked in text, a tuned one in turns."""
    questions = [
        {"question": f"What is {i}?", "subject": "numbers", "choices": list("abcd"), "answer": i % 4} for i in range(9)
    ]
    for split in ("test", "dev"):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    spec = f"mmlu:{place}"
    asked = {"tasks": spec, "eval_problems": 8, "eval_every": 2}
    told = {stage: run(place, stage, "asked", **asked) for stage in ("pretrain", "sft")}
    for stage, result in told.items():
        lines = [line for line in records(place / "runs/asked" / stage) if "mmlu_accuracy" in line]
        assert [line["step"] for line in lines] == ([2, 4] if stage == "pretrain" else [0, 2, 4])
        assert lines[-1]["mmlu_accuracy"] == result["mmlu_accuracy"]
        for step in (2, 4):
            checkpoint = f"{place}/runs/asked/{stage}@{step}"
            again = launch_evaluate.main([f"--checkpoint={checkpoint}", "--tasks", spec, "--limit=8"])
            (line,) = [line for line in lines if line["step"] == step]
            assert again["mmlu"]["accuracy"] == line["mmlu_accuracy"] and again["mmlu"]["count"] == 8
    base = launch_evaluate.main([f"--checkpoint={place}/runs/asked/pretrain", "--tasks", spec, "--limit=8"])
    records_of = lambda result: (Path(result["out"]) / "mmlu.jsonl").read_text()  # noqa: E731
    assert '"style":"text"' in records_of(base) and '"style":"chat"' in records_of(again)


def test_a_later_stage_takes_the_model_of_where_it_starts(place, capfd):
    with_base(place, "other")
    told = run(place, "sft", "other", depth=2, steps=2)
    e = checkpoint.read_experiment(Path(told["checkpoint"]), Experiment)
    assert e.depth == 1 and e.model.depth == 1
    said = [line for line in capfd.readouterr().err.splitlines() if "of this command is not used" in line]
    assert len(said) == 1 and "/other/pretrain: depth=2 and" in said[0] and "(1 there)" in said[0]


def test_without_steps_the_rows_are_taken_once(place):
    directory = with_base(place, "once")
    told = run(place, "sft", "once", steps=0)
    manifest = json.loads((directory / "rows/sft-train.json").read_text())[0]
    assert told["step"] == max(1, sum(shard["rows"] for shard in manifest["shards"]) // 4)
    again = run(place, "sft", "once", steps=0)
    assert again["step"] == told["step"], "and a finished run is not begun again"


def test_warm_moments_make_another_first_step(place):
    with_base(place, "cold"), with_base(place, "warm")
    cold, warm = (
        run(place, "sft", name, steps=2, **more) for name, more in (("cold", {}), ("warm", {"warm_optimizer": True}))
    )
    assert cold["val_loss_before"] == warm["val_loss_before"] and cold["val_loss"] != warm["val_loss"]


def test_a_stage_without_its_start_says_what_to_run(place):
    with pytest.raises(UserError, match=r"sft starts from .*/nowhere/pretrain: no checkpoint.*train that stage first"):
        run(place, "sft", "nowhere")


def test_what_cannot_be_is_refused_before_anything_is_compiled(place, monkeypatch):
    monkeypatch.setattr(running, "compile_step", lambda *_: pytest.fail("compiled"))
    directory = with_base(place, "refused")
    (directory / "baker.py").write_text(
        "class Baker:\n    name, tools, problems, score = 'baker', ('oven',), None, None\n"
    )
    for told, stage, changes in (
        ("did you mean arithmetic", "rl", {"rl.tasks": "aritmetic"}),
        ("did you mean spelling", "sft", {"tasks": "speling"}),
        ("unknown tool 'oven'", "rl", {"rl.tasks": f"{directory / 'baker.py'}:Baker"}),
        ("rl.max_tokens=160 leaves no room for a question in a row of 160", "rl", {"rl.max_tokens": 160}),
    ):
        with pytest.raises(UserError, match=told):
            run(place, stage, "refused", **changes)
    assert not (directory / "rl").exists() and not (directory / "sft").exists()


def test_rl_gives_every_number_of_a_step(place):
    with_base(place, "learned")
    told = run(place, "rl", "learned", tasks="arithmetic")
    steps = [line for line in records(place / "runs/learned/rl") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    written = (place / "runs/learned/rl/metrics.jsonl").read_text().splitlines()
    for line in (line for line in map(json.loads, written) if "loss" in line):
        parts = [line[f"{part}_seconds"] for part in ("sample", "score", "train")]
        assert line["seconds"] == pytest.approx(sum(parts)) and line["train_seconds"] > 0
        assert (line["sample_seconds"] > 0) == (line["step"] % 2 == 1), "a rollout batch is trained on twice"
    for line in steps:
        assert line["gap_max"] < 1e-4 and line["answers"] == 8 and line["reward"] == line["reward_brevity"]
    # The first update of a rollout batch is at the policy that sampled it.
    for line in steps[::2]:
        assert line["ratio"] == pytest.approx(1, abs=1e-5) and line["clipped"] == 0
    assert told["problems"] == 4 and told["val_bpb_before"] > 0 and "arithmetic_strict" in told
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "name, settings, most",
    [
        ("drawn", {"rl.temperature": 0.7, "rl.top_k": 9, "rl.top_p": 0.8}, (1e-4, 1e-4)),
        ("halved", {"dtype": "bfloat16", "rl.top_p": 0.9}, (5e-3, 5e-2)),
    ],
)
def test_sampler_and_trainer_agree_on_what_was_kept(place, name, settings, most):
    with_base(place, name)
    run(place, "rl", name, steps=2, eval_every=0, **{"rl.epochs": 1, "rl.max_tokens": 24} | settings)
    steps = [line for line in records(place / f"runs/{name}/rl") if "loss" in line]
    assert len(steps) == 2
    for line in steps:
        assert 0 < line["gap_mean"] < most[0] and line["gap_p99"] < most[1] and np.isfinite(line["gap_max"])
        assert 0 < line["entropy"] < np.log(400 * 0.9), "of what was kept"


def test_rl_refuses_steps_that_leave_a_rollout_batch_unfinished(place):
    with_base(place, "odd")
    with pytest.raises(UserError, match="steps=3 is not a multiple of the 2 updates"):
        run(place, "rl", "odd", steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("stage, steps", [("sft", 10), ("rl", 8)])
def test_killed_runs_end_as_an_uninterrupted_one(place, stage, steps):
    whole, killed = (with_base(place, f"{stage}-{name}") / stage for name in ("whole", "killed"))
    finish(launch(*flags(place, stage, f"{stage}-whole", steps=steps)))
    # In the middle of training, and, in RL, of sampling: a checkpoint is followed by it.
    process = launch(*flags(place, stage, f"{stage}-killed", steps=steps))
    send_at(process, killed / "metrics.jsonl", 3, signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    process = launch(*flags(place, stage, f"{stage}-killed", steps=steps))
    while process.poll() is None and not (killed / "checkpoints/4").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    _, err = finish(launch(*flags(place, stage, f"{stage}-killed", steps=steps)))
    assert "continuing from step" in err
    assert_same_end(killed, whole)


def test_a_signal_waits_for_the_end_of_a_rollout_batch(place):
    with_base(place, "signalled")
    stage = place / "runs/signalled/rl"
    process = launch(*flags(place, "rl", "signalled", steps=8))
    send_at(process, stage / "metrics.jsonl", 2, signal.SIGTERM)
    finish(process, 75)
    assert checkpoint.finished_steps(stage)[-1] % 2 == 0


def test_text_among_conversations_is_learned_whole(place):
    directory = with_base(place, "both")
    argv = flags(place, "sft", "both", steps=2)
    at = next(i for i, word in enumerate(argv) if word.startswith("--data.train="))
    argv[at : at + 1] = ["--data.train", "tinyworld:chat:60", "text:tinyworld:train:50"]
    at = argv.index("--data.epochs")
    argv[at : at + 1] = ["--data.epochs", "1", "0.5"]
    stages.run(command_line.load(argv))
    talk, text = json.loads((directory / "rows/sft-train.json").read_text())
    assert talk["recipe"]["form"] == "chat" and text["recipe"]["form"] == "text"
    assert talk["trained"] < 0.8 * talk["tokens"] and text["tokens"] > 0
    found = [path for path in (place / "cache/rows").iterdir() if Rows(path).manifest["spec"].startswith("text:")]
    ids_RS, flags_RS = Rows(found[0]).read([0])
    assert np.count_nonzero(flags_RS & 2) > 0.9 * ids_RS.size


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rl"])
def test_every_evaluation_on_held_out_rows_is_bounded(stage):
    """By eval_rows at intervals, and always by what the run trains on."""
    e = command_line.load([f"--config=configs/tiny.py:{stage}", "--steps=20", "--eval_rows=5"])
    for in_all, rows in ((3, (3, 3)), (100, (5, 100)), (10**6, (5, 20 * e.batch_rows))):
        held_out = SimpleNamespace(rows_in_all=in_all)
        assert tuple(rows_to_score(e, held_out, last=last) for last in (False, True)) == rows
    every = dataclasses.replace(e, eval_rows=0)
    assert rows_to_score(every, SimpleNamespace(rows_in_all=30), last=False) == 30


def test_the_loss_on_held_out_conversations_takes_as_many_rows_as_asked(place):
    with_base(place, "bounded")
    changes = {"steps": 4, "eval_every": 2, "eval_rows": 1, "data.val": "tinyworld:chat:60"}
    told = run(place, "sft", "bounded", **changes)
    rows = [line["val_loss_rows"] for line in records(place / "runs/bounded/sft") if "val_loss" in line]
    assert rows == [told["val_loss_rows"], 1, told["val_loss_rows"]] and 1 < told["val_loss_rows"] <= 4 * 4
