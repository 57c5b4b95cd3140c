import json
import sys
from pathlib import Path
from typing import Any

import exports
import jax
import numpy as np
import pytest
from outside import read

from configs import recipe
from jaxchat.benchmarks import decode, evaluate, rl, train
from jaxchat.errors import UserError
from jaxchat.evaluation.questions import Answer
from jaxchat.experiment import Experiment
from jaxchat.export import huggingface
from jaxchat.export.places import to_params
from jaxchat.sharding import Mesh
from launch import bench

DIAL = recipe.Dial(
    depth=1, family="october2025", steps=10, batch_tokens=32, vocab=64, row_length=16, head_dim=32, windows="L"
)


def experiment(dial: recipe.Dial = DIAL) -> Experiment:
    return recipe.pretrain(dial, name="bench", train=("tinyworld:train",), micro_rows=2, mesh=Mesh(1), dtype="float32")


def test_peer_gets_the_weights_under_its_own_names() -> None:
    golden = read("nanochat_v1_gqa")
    config = huggingface.read_config(golden.config)
    state = train.state_dict(config, to_params(config, golden.weights, huggingface.LAYERS, huggingface.ENDS))
    assert state.keys() == golden.weights.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value, golden.weights[name], err_msg=name)


def test_benchmark_reports_speed_beside_the_matmul_peak() -> None:
    result = train.run(experiment(), train.Bench(blocks=2, block_steps=2, pause=0.0))
    assert result["steps"] == 4
    assert result["tokens_per_second"] > 0
    assert result["roofline_fraction"] == pytest.approx(
        result["tokens_per_second"] * result["flops_per_token"] / result["peak_flops_per_second"], abs=1e-4
    )
    assert result["ratio"] is None
    assert 0 < result["loss"] < 2 * np.log(64)
    assert result["machine"]["devices"] == jax.device_count()


def test_peer_of_another_architecture_is_refused() -> None:
    newest = recipe.Dial(depth=1, steps=10, batch_tokens=32, vocab=64, row_length=16, head_dim=32)
    with pytest.raises(UserError, match="October 2025"):
        train.run(experiment(newest), train.Bench(peer="transformers"))


def test_missing_peer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"jaxchat\[interop\]"):
        train.run(experiment(), train.Bench(peer="transformers"))


def test_rollouts_of_three_ways_are_timed_in_one_run() -> None:
    small = rl.Bench(prompts=2, samples=2, prompt_tokens=4, decode_tokens=6, chunk=2, slots=4, repeats=1, single=2)
    result = rl.run(experiment(), small)
    for way in ("prompt", "sample"):
        told = result["rollouts_per_second"] / result[f"a_{way}_at_a_time"]
        assert result[f"ratio_to_a_{way}_at_a_time"] == pytest.approx(told, rel=0.02)
    assert 1 <= result["answer_tokens"] <= 6


def test_unknown_benchmark_is_refused() -> None:
    with pytest.raises(UserError, match="train"):
        bench.main(["trian"])


def test_decoding_with_and_without_the_cache_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxchat.benchmarks.cache.FEW", 4)
    monkeypatch.setattr("jaxchat.benchmarks.cache.MANY", 16)
    sizes: dict[str, Any] = {"batch_sizes": (2,), "prompt_tokens": 8, "decode_tokens": 6, "chunk": 3, "lengths": (7,)}
    asked = decode.Bench(**sizes, repeats=1, temperature=0.7, top_p=0.9, speculative=False)
    result = decode.run(experiment(), asked)
    (batch,), (cache,) = result["batches"], result["cache"]
    assert batch["rows"] == 2
    assert batch["tokens_per_second"] > 0
    assert cache["tokens"] == 7
    assert cache["equal"]
    assert result["prefixes"]["stored"] == [4, 16]


@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_evaluation_together_answers_as_one_at_a_time(weights: Any, tmp_path: Path) -> None:
    checkpoint = exports.write_run(tmp_path, exports.model(head_std=0.1), length=96, scale=0.4)
    rows = [{"question": f"Is {i} old?", "subject": "age", "choices": list("abcd"), "answer": i % 4} for i in range(9)]
    for split in ("test", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = (f"mmlu:{tmp_path}", "facts")
    asked: dict[str, Any] = {"limit": 7, "problems": 5, "max_tokens": 4, "slots": 2, "shuffle": 1}
    mesh = Mesh(data=2)
    told = evaluate.run(evaluate.Bench(checkpoint, tasks, weights=weights, mesh=mesh, **asked), Experiment)
    assert told["questions"]["questions"] == 7 and told["facts"]["problems"] == 5
    assert told["questions"]["different_answers"] == told["facts"]["different_texts"] == 0
    assert told["questions"]["largest_score_gap"] < 1e-4
    assert told["questions"]["ratio"] > 0 and told["facts"]["ratio"] > 0
    alone, near, far = (Answer(False, 0, scores, 0) for scores in ((-3.0,), (-3.0, -3.00001), (-3.0, -4.0)))
    assert [evaluate._close(one) for one in (alone, near, far)] == [False, True, False]
    with pytest.raises(UserError, match="name a checkpoint and tasks"):
        evaluate.run(evaluate.Bench(checkpoint), Experiment)
