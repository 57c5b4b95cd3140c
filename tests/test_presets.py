"""Families named after well-known models: the budget of the depth's default, and the parts of their models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import launch.plan
import launch.train
from configs import d4, d12, tiny
from configs.families import FAMILIES
from jaxchat import serialization
from jaxchat.experiment import Experiment
from jaxchat.model import GELU, MLA, GeGLU, LayerNorm, Learned, MoE, RMSNorm, RoPE, SwiGLU
from jaxchat.model.counts import flops_per_token

ROOT = Path(__file__).parent.parent
NAMES = [name for name, family in FAMILIES.items() if family.rates is None]


def experiment(config, name, stage="pretrain", **changes):
    dial = config.DIALS.get(stage, config.DIAL)
    return config.get_config(stage, dataclasses.replace(dial, family=name, **changes))


def models(name):
    return [experiment(tiny, name, depth=2).model, experiment(d4, name).model, experiment(d12, name).model]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config, depth", [(tiny, 2), (d4, 4), (d12, 12)])
def test_a_family_has_the_budget_of_the_depths_default(config, depth, name):
    default, own = experiment(config, "auto", depth=depth), experiment(config, name, depth=depth)
    same = {"model": default.model, "optimizer": default.optimizer}
    assert dataclasses.replace(own, **same) == default  # Steps, batch, data and everything else.
    flops = [flops_per_token(e.model, e.data.row_length)["total"] for e in (default, own)]
    assert flops[1] == pytest.approx(flops[0], rel=0.006)
    assert serialization.from_json(Experiment, json.loads(json.dumps(serialization.to_json(own)))) == own
    for stage in ("sft", "rl"):
        default, own = experiment(config, "auto", stage, depth=depth), experiment(config, name, stage, depth=depth)
        assert own.optimizer.scale == default.optimizer.scale


@pytest.mark.parametrize("depth", [1, 2, 4, 13])
def test_long_rows_leave_the_feed_forwards_at_least_the_width(depth):
    for name in NAMES:
        model = experiment(d12, name, depth=depth).model
        assert model.layers[0].mlp.hidden >= model.width


@pytest.mark.parametrize("name", NAMES)
def test_gains_move_as_slowly_as_nanochats_factors_of_the_residual_stream(name):
    for config in (tiny, d12):
        default, own = (experiment(config, family).optimizer for family in ("auto", name))
        assert own.scalars == dataclasses.replace(default.resid_scale, weight_decay=0.0)
        model = experiment(config, name).model
        changed = {field for field, value in vars(own).items() if value != getattr(default, field)}
        assert changed <= {"scalars", "head", "embed"}
        assert model.softcap is None  # So the head is slow.
        assert own.head == dataclasses.replace(default.head, learning_rate=default.head.learning_rate / 10)
        assert own.embed == (own.head if model.tied else default.embed)


def test_gpt2_has_its_parts():
    for model in models("gpt2"):
        (layer,) = set(model.layers)
        assert (type(layer.mlp), layer.mlp.bias, layer.norm) == (GELU, True, LayerNorm())
        assert layer.mixer.qkv_bias and layer.mixer.o_bias and layer.mixer.qk_norm is None
        assert type(layer.mixer.positions) is Learned and layer.placement == "before" and model.tied


def test_llama_and_qwen3_differ_in_the_norm_of_the_heads():
    for llama, qwen in zip(models("llama"), models("qwen3"), strict=True):
        (one,), (other,) = set(llama.layers), set(qwen.layers)
        assert one.mixer.heads > one.mixer.kv_heads and one.mixer.positions == RoPE(500_000.0, 1)
        assert type(one.mlp) is SwiGLU and one.mlp == other.mlp and one.norm == RMSNorm(eps=1e-5, gain="w")
        assert (one.mixer.qk_norm, other.mixer.qk_norm) == (None, RMSNorm(gain="w"))
        assert other.mixer.qk_norm_first and not other.mixer.qk_norm_whole


def test_olmo2_normalises_what_a_part_adds_and_all_heads_at_once():
    for model in models("olmo2"):
        (layer,) = set(model.layers)
        assert layer.placement == "inside" and layer.mixer.qk_norm_whole and layer.mixer.qk_norm_first


def test_gemma3_has_local_layers_and_global_ones_and_ends_in_a_global_one():
    deep = experiment(d12, "gemma3", depth=14).model
    assert [layer.mixer.window is None for layer in deep.layers] == [i in (5, 11, 13) for i in range(14)]
    assert (len(deep.pattern), len(deep.tail), deep.layer_loop) == (6, 2, "scan")
    for model in [*models("gemma3"), deep]:
        for layer in model.layers:
            assert layer.mixer.positions.base == (1e6 if layer.mixer.window is None else 1e4)
            assert type(layer.mlp) is GeGLU and layer.placement == "sandwich" and layer.norm.gain == "1+w"
        assert model.embed_scale == model.width**0.5 and model.tied


def test_deepseeks_first_layer_is_dense_and_a_tokens_experts_are_as_wide():
    for model in models("deepseek"):
        first, *others = model.layers
        assert type(first.mlp) is SwiGLU and {type(layer.mixer) for layer in model.layers} == {MLA}
        for experts in (layer.mlp for layer in others):
            assert type(experts) is MoE and experts.router == "sigmoid" and experts.selection_bias
            assert experts.active * experts.hidden + experts.shared == first.mlp.hidden


def test_a_family_is_planned_trained_and_decoded(tmp_path, monkeypatch):
    own = {"head_dim": 8, "batch_tokens": 640, "data.vocab": 400, "data.row_length": 160, "steps": 2}
    data = {"data.train": "tinyworld:train:150", "data.val": "tinyworld:val:4", "micro_rows": 2, "eval_rows": 4}
    flags = own | data | {"depth": 2, "family": "deepseek", "keep_params": 0, "directory": tmp_path, "mesh.data": 1}
    argv = ["--config=configs/tiny.py", *(f"--{key}={value}" for key, value in flags.items()), "--prompts", "One"]
    monkeypatch.chdir(ROOT)
    assert launch.plan.main(argv[:-2])["stages"]["pretrain"]["tokens"] == 1280
    found = launch.train.main(argv)
    assert found["step"] == 2 and np.isfinite(found["loss"]) and found["unstable_steps"] == 0
