"""The recipe's families and the law for the learning rates of small batches."""

import dataclasses
import hashlib
import json
import math

import pytest

from configs import d4, d12, recipe, tiny
from configs.recipe import Dial
from jaxchat import optim
from jaxchat.data import tinyworld
from jaxchat.data.tinyworld import talk
from jaxchat.tasks import TASKS

RATES = ("muon", "head", "embed", "value_embeddings", "resid_scale", "x0_scale", "scalars")


def test_small_depths_are_november_and_others_july():
    for depth, name in ((3, "november2026"), (11, "november2026"), (12, "july2026"), (32, "july2026")):
        assert recipe.family(Dial(depth)) is recipe.FAMILIES[name]
        assert recipe.family(Dial(depth, family="october2025")) is recipe.FAMILIES["october2025"]
    assert d12.get_config().optimizer == recipe.optimizer(dataclasses.replace(d12.DIAL, family="july2026"))


def peak(**changes):
    """The factor of all rates of a small november2026 dial."""
    dial = Dial(**{"depth": 3, "batch_tokens": 2**11, "steps": 450} | changes)
    return optim.peak_factor(recipe.optimizer(dial), recipe.steps(dial))


@pytest.mark.parametrize("batch", [2**18, 2**19, 2**20])
def test_november_is_july_where_nanochats_rule_was_fitted(batch):
    dial = Dial(12, family="november2026", batch_tokens=batch)
    assert recipe.optimizer(dial) == recipe.optimizer(dataclasses.replace(dial, family="july2026"))


def test_the_law_meets_nanochats_at_its_smallest_batch():
    assert peak(batch_tokens=2**18 - 2**8, steps=2520) == pytest.approx(math.sqrt(0.5), rel=1e-3)


def test_small_batches_keep_rates_that_nanochats_rule_would_divide():
    old, new = (
        recipe.optimizer(Dial(3, family=name, batch_tokens=2**11, steps=450)) for name in ("july2026", "november2026")
    )
    assert old.muon.learning_rate == pytest.approx(0.02 / 16) and new.muon.learning_rate == 0.02
    for name in set(RATES) - {"muon", "scalars", "x0_scale"}:
        assert getattr(old, name).learning_rate == pytest.approx(getattr(new, name).learning_rate / 16)
    assert peak() == pytest.approx(math.sqrt(0.5) * 2**-0.7 * 5.6**0.7)
    assert peak(batch_tokens=2**14) / peak() == pytest.approx(8**0.1)
    assert peak(steps=1800) / peak() == pytest.approx(4**-0.7)
    assert peak(steps=1) == peak(steps=40) < 8  # No run of a few steps gets more than was tried.


def test_more_steps_are_the_same_experiment():
    """So that a run can be continued with other --steps; only the schedule follows."""
    one, other = (tiny.get_config(dial=dataclasses.replace(tiny.DIAL, steps=steps)) for steps in (450, 600))
    assert dataclasses.replace(other, steps=450) == one


@pytest.mark.parametrize("config", [tiny, d4])
def test_the_small_configurations_are_of_the_new_family(config):
    assert recipe.family(config.DIAL) is recipe.FAMILIES["november2026"]


def test_stages_after_pretraining_replace_the_law_by_the_familys_own_scale():
    stages = {stage: tiny.get_config(stage, tiny.DIALS.get(stage, tiny.DIAL)) for stage in ("pretrain", "sft", "rl")}
    scales = {stage: e.optimizer.scale for stage, e in stages.items()}
    assert scales == {"pretrain": pytest.approx(math.sqrt(0.5) * 2**-0.7), "sft": 0.25, "rl": 0.125}
    assert [e.optimizer.steps_exponent for e in stages.values()] == [0.7, 0.0, 0.0]
    assert {e.optimizer.muon.learning_rate for e in stages.values()} == {0.02}
    assert [stages[stage].optimizer.muon.weight_decay for stage in ("sft", "rl")] == [0.0, 0.0]
    large = d12.get_config("sft", d12.DIALS["sft"]), d12.get_config("rl", d12.DIALS["rl"])
    assert [e.optimizer.scale for e in large] == [0.8, 0.05]  # nanochat's.


def test_the_world_and_its_problems_are_what_scores_were_measured_on():
    """Texts, conversations and held-out problems, byte for byte; the hashes are those of commit 213a2aa."""
    parts = {
        "train": [tinyworld.document("train", i) for i in range(200)],
        "val": [tinyworld.document("val", i) for i in range(200)],
        "chat": [tinyworld.conversation("train", i) for i in range(200)],
        "problems": [(p.question, p.answer) for p in TASKS["arithmetic"]().problems("test")[:512]],
    }
    hashes = {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}
    assert hashes == {
        "train": "1a99e50caa1cb921",
        "val": "2a797f6c1befea67",
        "chat": "b19d2f8500b1d84c",
        "problems": "0a65998b9d8d0f06",
    }
    e = tiny.get_config("rl")
    assert (talk.TOOL_SHARE, e.tasks, e.eval_problems, e.eval_samples) == (0.4, ("arithmetic",), 512, 1)


@pytest.mark.parametrize("depth", [12, 13, 14, 15, 18, 23, 26, 32])
def test_deep_models_scan_over_repeats_of_four_layers_at_any_depth(depth):
    model = recipe.model(Dial(depth))
    assert model.layer_loop == "scan" and len(model.pattern) == 4 and len(model.tail) == depth % 4
    windows = [layer.mixer.window is not None for layer in model.layers]
    assert windows == [i % 4 != 3 and i != depth - 1 for i in range(depth)]
    tables = [layer.mixer.value_embedding is not None for layer in model.layers]
    assert tables == [i % 2 == (depth - 1) % 2 for i in range(depth)]
    assert [i for stack in model.stacks for i in stack if i < 4] == [0, 1, 2, 3]
    assert sorted(i for stack in model.stacks for i in stack) == list(range(depth))


def test_shallow_models_keep_one_stack_a_layer():
    """Their checkpoints stay valid; they are unrolled."""
    for depth in (3, 6, 11):
        model = recipe.model(Dial(depth))
        assert (len(model.pattern), model.tail, model.layer_loop) == (depth, (), "unroll")
