"""The benchmarks, in tiny sizes on a CPU."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exports
import jax
import numpy as np
import pytest

from benchmarks import accelerator, decoding, evaluation, options, peer, rl, timing, training
from configs import recipe
from jaxchat import compilation, launcher
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.model import Transformer
from jaxchat.sharding import Mesh, make_mesh
from launch import bench

ROOT = Path(__file__).parent.parent
SIZES = {
    "depths": 1,
    "data.row_length": 128,
    "data.vocab": 512,
    "head_dim": 32,
    "batch_tokens": 1024,
    "block_steps": 3,
    "rows": 2,
    "repeats": 2,
    "loss_chunks": "64,128",
    "batch_sizes": "1,2",
    "prompt_tokens": 6,
    "decode_tokens": 5,
    "prompts": 2,
    "samples": 2,
    "cache": ROOT / ".jax_cache",
}


def experiment(depth: int = 1, family: Any = "october2025", rows: int = 2) -> Experiment:
    dial = recipe.Dial(depth, family, steps=10, batch_tokens=16 * rows, vocab=64, row_length=16, head_dim=32)
    fields: dict[str, Any] = {"micro_rows": rows, "mesh": Mesh(1), "dtype": "float32"}
    return recipe.pretrain(dial, name="bench", train=("tinyworld:train",), **fields)


class FakePeer:
    """Takes half a second for a step and answers with token 1."""

    def __init__(self, model: Any, params: Any, *, dtype: Any, threads: int, ids: np.ndarray = peer.NO_IDS) -> None:
        assert np.shape(params["ends"]["embed"])[1] == model.width
        self._rows = ids.shape[1]

    def train(self, steps: int) -> peer.StepOutputs:
        return peer.StepOutputs([0.5] * steps, [1.0] * (1 + steps), self._rows)

    def generate(self, prompts: Any, count: int) -> list[tuple[int, ...]]:
        return [(1,) * count for _ in prompts]


@pytest.mark.parametrize("beside", ["none", "transformers"])
def test_training_reports_speed_beside_the_peak_and_the_peer(beside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "Peer", FakePeer)
    asked = options.Bench(peer=beside, blocks=2, block_steps=2, pause=0.0)
    row = training.measure(training.adamw_only(experiment()), asked)
    assert row["step_seconds"]["count"] == 4
    speed = 32 / row["step_seconds"]["median"]
    assert row["tokens_per_second"] == pytest.approx(speed)
    fraction = speed * row["flops_per_token"] / row["peak_flops_per_second"]
    assert row["roofline_fraction"] == pytest.approx(fraction)
    assert 0 < row["loss"] < 2 * np.log(64)
    assert row["first_step_seconds"] > row["compile_seconds"] > 0
    assert row["micro_rows"] == 2 and row["attention"] == "xla", "what was used, not what was asked for"
    if beside == "none":
        assert row["ratio"] is None
    else:
        assert row["ratio"] == pytest.approx(speed / 64)
        assert (row["peer_tokens_per_second"], row["peer_loss"], row["peer_micro_rows"]) == (64, 1.0, 2)


def test_a_late_block_has_fewer_steps() -> None:
    asked = options.Bench(blocks=1, block_steps=50, pause=0.0)
    row = training.measure(training.adamw_only(experiment()), asked, deadline=time.monotonic())
    assert row["step_seconds"]["count"] == training.LEAST_STEPS


def test_steps_are_dispatched_before_the_metrics_of_the_last_are_read() -> None:
    events: list[str] = []

    class Loss:
        def __init__(self, number: int) -> None:
            self.number = number

        def item(self) -> float:
            events.append(f"read {self.number}")
            return float(self.number)

    def step(state: int, batch: str) -> tuple[int, dict[str, Any]]:
        events.append(f"step {state} {batch}")
        return state + 1, {"loss": Loss(state), "skipped_in_row": np.int32(0)}

    trainer: Any = training.Trainer.__new__(training.Trainer)
    trainer.compiled, trainer._batches = SimpleNamespace(step=step, rows=1), ["even", "odd"]
    trainer._mesh, trainer._number, trainer._state = make_mesh(Mesh(1), rows=1, devices=jax.devices()[:1]), 0, 0
    found = trainer.train(2)
    assert events == ["step 0 even", "step 1 odd", "read 0", "step 2 even", "read 1", "read 2"]
    assert (found.losses, len(found.seconds)) == ([0.0, 1.0, 2.0], 2), "the first step warms up"
    assert trainer.train(0).losses == [3.0] and events[-2:] == ["step 3 odd", "read 3"]


def test_a_smaller_micro_batch_is_tried_after_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def measure(e: Experiment, bench: Any, deadline: float) -> dict[str, Any]:
        tried.append(e.micro_rows)
        if len(tried) < 3:
            raise compilation.OutOfMemory("no memory", 4 // len(tried) if len(tried) < 4 else None)
        return {"speed": 1.0}

    monkeypatch.setattr(training, "measure", measure)
    run = accelerator.Run("gpu", options.Bench(), (), math.inf)
    assert run.train(experiment(rows=8)) == {"speed": 1.0} and tried == [8, 4, 2]


def test_another_architecture_is_refused_and_a_missing_peer_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options.Bench(peer="transformers")
    with pytest.raises(UserError, match="October 2025"):
        training.measure(experiment(family="july2026"), asked)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"\.\[interop\]"):
        training.measure(experiment(), asked)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_takes_the_same_steps_and_gives_the_same_answers(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("torch"), "compile", lambda function: function)
    pytest.importorskip("transformers")
    e = training.adamw_only(dataclasses.replace(experiment(2), dtype=dtype))  # type: ignore[arg-type]
    setup, ids = compilation.make_setup(e, launcher.log), np.random.default_rng(0).integers(0, 64, (4, 2, 17), np.int32)
    torch = peer.Peer(e.model, training.start_state(setup).params, ids=ids, dtype=dtype, threads=1)
    ours = training.Trainer(setup, ids)
    close = 1e-4 if dtype == "float32" else 0.05
    np.testing.assert_allclose(torch.train(4).losses, ours.train(4).losses, atol=close)
    transformer, weights = decoding.random_model(dataclasses.replace(e, dtype="float32"))
    engine = decoding.make_engine(transformer, weights, options.Bench(), length=16, slots=2)
    prompts = decoding.random_prompts(64, 2, 6)
    answers = decoding.generate(engine, prompts, SamplingParams(0.0, max_tokens=8, ignore_end=True))
    torch = peer.Peer(e.model, weights, dtype="float32", threads=1)
    assert torch.generate(prompts, 8) == [answer.tokens for answer in answers]


def test_rollouts_of_three_ways_are_timed_in_one_run() -> None:
    asked = options.Bench(prompts=2, samples=2, prompt_tokens=4, decode_tokens=6, slots=4, repeats=1)
    row = rl.measure(*decoding.random_model(experiment()), asked)
    for way in ("prompt", "sample"):
        ratio = row["rollouts_per_second"] / row[f"a_{way}_at_a_time"]
        assert row[f"ratio_to_a_{way}_at_a_time"] == pytest.approx(ratio)
    assert 1 <= row["answer_tokens"] <= 6


def test_decoding_with_and_without_the_cache_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FEW", 4)
    monkeypatch.setattr(decoding, "MANY", 16)
    sizes: dict[str, Any] = {"prompt_tokens": 8, "decode_tokens": 6, "chunk": 3, "repeats": 1}
    asked = options.Bench(**sizes, temperature=0.7, top_p=0.9)
    model = decoding.random_model(experiment())
    cache = decoding.cache_gain(*model, asked, 7)
    assert cache["tokens"] == 7 and cache["equal"]
    assert cache["ratio"] == pytest.approx(cache["naive_seconds"] / cache["cached_seconds"])
    assert decoding.stored_prefixes(*model, asked)["stored"] == [4, 16]


def test_speculation_changes_no_token() -> None:
    asked = options.Bench(prompt_tokens=8, decode_tokens=3, chunk=3, repeats=1)
    found = decoding.speculation(*decoding.random_model(experiment()), asked)
    assert {name: row["equal"] for name, row in found.items()} == {"constant": True, "random": True}


def test_decoding_is_set_beside_the_peer_and_the_memory() -> None:
    asked = options.Bench(prompt_tokens=8, decode_tokens=6, chunk=3, repeats=1)
    model = decoding.random_model(experiment())
    torch = FakePeer(experiment().model, model[1], dtype="float32", threads=1)
    row = decoding.measure(*model, asked, 2, 1e9, torch)
    assert row["rows"] == 2 and row["answers_equal_to_peer"] == 0.0
    assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["peer_tokens_per_second"])
    assert row["roofline_fraction"] == pytest.approx(row["step_bytes"] / row["token_seconds"] / 1e9)


def test_the_commands_report_every_part_that_they_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("tokens_per_second", "peer_tokens_per_second", "ratio", "roofline_fraction")
    monkeypatch.setattr(decoding, "random_model", lambda e: (SimpleNamespace(config=e.model, dtype=e.dtype), None))
    monkeypatch.setattr(decoding, "copy_bandwidth", lambda: 1.0)
    monkeypatch.setattr(decoding, "measure", lambda *given: dict.fromkeys(names, given[3]))
    for part in ("cache_gain", "stored_prefixes", "speculation"):
        monkeypatch.setattr(decoding, part, lambda *_, part=part: part)
    monkeypatch.setattr(rl, "measure", lambda *_: {"rollouts_per_second": 3.0})
    argv = ["--config=configs/d4.py", "--batch_sizes=1,8", "--lengths=3,4", "--threads=1024"]
    found: Any = bench.main(["decode", *argv])
    assert [row["ratio"] for row in found["batches"]] == [1, 8] and [found[name] for name in names] == [8] * 4
    assert found["cache"] == ["cache_gain"] * 2 and found["prefixes"] == "stored_prefixes"
    assert found["speculation"] == "speculation" and found["machine"]["devices"] == jax.device_count()
    assert found["command"] == f"python -m launch.bench decode {' '.join(argv)}"
    assert bench.main(["decode", *argv, "--speculative=False"])["speculation"] is None
    assert bench.main(["rl", *argv])["rollouts_per_second"] == 3


def test_bytes_of_a_decoding_step_are_matrices_and_cache() -> None:
    e = experiment(2)
    M, V, T = e.model.width, 64, 10
    transformer = Transformer(e.model, jax.numpy.dtype("bfloat16"))
    counted = 2 * 12 * M * M + e.model.padded_vocab * M
    assert e.model.padded_vocab >= V
    assert decoding.step_bytes(transformer, 0, T) == 2 * counted
    assert decoding.step_bytes(transformer, 3, T) == 2 * (counted + 3 * T * 2 * M * 2)


def test_evaluation_together_answers_as_one_at_a_time(tmp_path: Path) -> None:
    checkpoint = exports.write_run(tmp_path, exports.model(head_std=0.1), length=96, scale=0.4)
    rows = [{"question": f"Is {i} old?", "subject": "age", "choices": list("abcd"), "answer": i % 4} for i in range(9)]
    for split in ("test", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = options.Bench(checkpoint=checkpoint, tasks=(f"mmlu:{tmp_path}", "facts"), limit=5, max_tokens=4, slots=2)
    found = evaluation.run(asked, [])
    for name in ("questions", "facts"):
        assert found[name]["count"] == 5 and found[name]["different_answers"] == 0 and found[name]["ratio"] > 0
    assert found["machine"]["devices"] == jax.device_count() and found["versions"]["jax"] == jax.__version__
    with pytest.raises(UserError, match=r"--checkpoint=.* --tasks"):
        evaluation.run(options.Bench(checkpoint=checkpoint), [])
    with pytest.raises(UserError, match=r"limits.*did you mean --limit"):
        bench.main(["evaluate", f"--checkpoint={checkpoint}", "--tasks=facts", "--limits=3", "--threads=1024"])


def test_sides_take_turns_in_alternating_order() -> None:
    calls: list[str] = []
    sides: dict[str, Callable[[], Any]] = {name: lambda name=name: calls.append(name) or name for name in "ab"}
    seconds, results = timing.alternate(sides, 3)
    assert calls == list("abbaab") and results == {"a": ["a"] * 3, "b": ["b"] * 3} and seconds.keys() == {"a", "b"}
    assert timing.spread([3.0, 1.0, 2.0]) == pytest.approx({"median": 2, "p10": 1.2, "p90": 2.8, "count": 3})


def test_unknown_benchmarks_and_options_are_refused() -> None:
    with pytest.raises(UserError, match="train"):
        bench.main(["trian"])
    with pytest.raises(UserError, match=r"atention.*attention"):
        bench.main(["gpu", "--only=train,atention"])
    with pytest.raises(UserError, match=r"jax.*transformers"):
        bench.main(["gpu", "--peer=jax"])
    with pytest.raises(UserError, match="block_steps=0 must be at least 1"):
        bench.main(["gpu", "--block_steps=0"])
    with pytest.raises(UserError, match="greedy"):
        bench.main(["decode", "--config=configs/d4.py", "--peer=transformers", "--temperature=0.5"])


def test_other_arguments_describe_the_experiment() -> None:
    argv = [
        "--config=configs/d4.py",
        "--batch_sizes=1,2",
        "--data.vocab=512",
        "--batch_tokens",
        "1024",
        "--threads=1024",
    ]
    asked, others = options.read("decode", argv, "")
    assert asked.batch_sizes == (1, 2)
    e = options.load(asked, others)
    assert (e.depth, e.data.vocab, e.batch_tokens, e.data.row_length) == (4, 512, 1024, 512)
    assert e.model.smear is None, "the October 2025 family"
    assert options.load(options.Bench(peer="transformers"), others).dtype == "float32"
    arguments = ["--mesh.fsdp=4", "--data.row_length=1024"]
    run = accelerator.Run("gpu", options.Bench(depths=(1,)), arguments, math.inf)
    assert run.experiment().mesh == Mesh(fsdp=4) and run.experiment().depth == 1


# The benchmark of an accelerator.


@pytest.mark.parametrize("window", [None, 1, 5, 11, 12, 40])
def test_attention_flops_are_those_of_the_pairs_that_see_each_other(window: int | None) -> None:
    q, k = np.arange(12)[:, None], np.arange(12)
    seen = (k <= q) & (k > q - 1 - (99 if window is None else window))
    # Two products of D multiplications and additions per pair.
    assert accelerator.attention_flops(3, 12, 2, 8, window=window) == 3 * 2 * int(seen.sum()) * 2 * (8 + 8)
