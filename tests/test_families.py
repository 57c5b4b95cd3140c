"""Families of weights against transformers: models of random weights whose results are in tests/golden/families.npz."""

import dataclasses
import json
import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from outside import read_arrays
from weights import checksum, random_weight

from jaxchat.errors import UserError
from jaxchat.export import families, huggingface, verify
from jaxchat.export.families.keys import NEUTRAL
from jaxchat.export.places import State, to_params
from jaxchat.model import Layer, Model, Transformer

pytestmark = pytest.mark.quick

NAMES = ("gpt2", "llama", "llama3", "llama_linear", "llama_yarn", "mistral", "qwen2", "qwen3", "olmo2", "gemma3")
NAMES += ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "nanochat")
GRADIENTS = ("gpt2", "llama3", "gemma3")
CACHES = ("gpt2", "gemma3", "deepseek_v3")  # Every kind of cache, and positions of every kind.
Weights = dict[str, np.ndarray]


@cache
def golden() -> dict[str, Any]:
    return read_arrays("families")


@cache
def source(name: str) -> tuple[dict[str, Any], Weights]:
    """The config.json and the weights of a model, made again."""
    wanted, shapes, config = json.loads(str(golden()[f"{name}/about"]))
    weights = {key: random_weight(key, tuple(shape), scale=0.2) for key, shape in shapes.items()}
    assert checksum(weights) == wanted, "these are other weights than the golden file's"
    return config, weights


@cache
def imported(name: str) -> tuple[families.Family, Model, Any]:
    config, weights = source(name)
    family = families.named(config)
    model, _ = family.read_config(config)
    return family, model, jax.tree.map(jnp.asarray, to_params(model, weights, family.places))


def test_every_family_is_in_the_golden_file() -> None:
    assert {source(name)[0]["model_type"] for name in NAMES} == set(families.FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_also_at_far_positions(name: str) -> None:
    _, model, params = imported(name)
    transformer, positions_T = Transformer(model), golden()[f"{name}/positions"]
    forward = transformer.apply(params, golden()["tokens"][None], positions_BT=positions_T[None].astype(np.int32))
    found, wanted = transformer.logits(params, forward.hidden)[0], golden()[f"{name}/logits"]
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(wanted).max() > 2 and (positions_T.max() > 4095 or model.most_positions)


@pytest.mark.parametrize("name", NAMES)
def test_ours_to_transformers_and_back_gives_the_same_bits(name: str) -> None:
    family, model, params = imported(name)
    state = State(model, params, family.places)
    assert set(state) == set(source(name)[1])
    for key, value in source(name)[1].items():
        np.testing.assert_array_equal(state[key], value, err_msg=key)
    again = families.family_of(model)
    length = model.most_positions or 8192
    config = json.loads(json.dumps({"model_type": again.model_type, **again.write(model, length)}))
    back, positions = families.read_config(config)
    assert back.layers == model.layers and back == model and positions == length
    for ours, theirs in zip(
        jax.tree.leaves(params), jax.tree.leaves(to_params(back, state, again.places)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", [n if n in CACHES else pytest.param(n, marks=pytest.mark.nightly) for n in NAMES])
def test_greedy_decoding_through_the_cache_is_transformers_generate(name: str) -> None:
    _, model, params = imported(name)
    transformer, wanted = Transformer(model), golden()[f"{name}/greedy"]
    prompt, by_layer = golden()["tokens"][:8], transformer.unstack(params)

    @jax.jit
    def extend(cache: Any, tokens_1T: Any, positions_1T: Any) -> Any:
        hidden_1TM, cache, _, _ = transformer.apply(by_layer, tokens_1T, positions_BT=positions_1T, cache=cache)
        return transformer.logits(by_layer, hidden_1TM)[0, -1].argmax(), cache

    cache = transformer.empty_cache(1, 8 + len(wanted), write=8)
    token, cache = extend(cache, prompt[None], np.arange(8, dtype=np.int32)[None])
    found = [int(token)]
    for position in range(8, 7 + len(wanted)):
        token, cache = extend(cache, token[None, None].astype(np.int32), np.array([[position]], np.int32))
        found.append(int(token))
    assert found == list(wanted)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_transformers(name: str) -> None:
    family, model, params = imported(name)
    transformer, tokens = Transformer(model), golden()["tokens"]
    positions_1T = golden()[f"{name}/positions"][None].astype(np.int32)

    def loss(params: Any) -> Any:
        hidden = transformer.apply(params, tokens[None], positions_BT=positions_1T).hidden
        logp_TV = jax.nn.log_softmax(transformer.logits(params, hidden)[0, :-1])
        return -jnp.take_along_axis(logp_TV, tokens[1:, None], axis=1).mean()

    state = State(model, jax.jit(jax.grad(loss))(params), family.places)
    for key, value in state.items():
        wanted, scale = golden()[f"{name}/gradients/{key}"]
        probe = random_weight(f"probe/{key}", value.shape)
        assert abs(np.vdot(value, probe) - wanted) < 1e-4 * scale, key


def fixed(name: str) -> dict[str, Any]:
    return {key: value for key, value in source(name)[0].items() if key not in NEUTRAL} | {
        "model_type": source(name)[0]["model_type"]
    }


JUNK = (None, 0, -1, 1, 7, 2**31 - 1, 0.5, 1e300, True, False, "", "1", [], [1], ["full_attention"], {}, {"a": 1})


@pytest.mark.parametrize("name", NAMES)
def test_junk_in_any_key_is_a_model_or_refused_by_name(name: str) -> None:
    config = fixed(name)
    keys = {key for key in families.FAMILIES[config["model_type"]].keys if "layers" not in key}
    for key in sorted(keys):
        for value in JUNK:
            try:
                families.read_config(config | {key: value})
            except UserError as error:
                assert key in str(error), f"{key}={value}: {error}"
    with pytest.raises(UserError, match="has other=1, which jaxchat does not know"):
        families.read_config(config | {"other": 1})


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "bert"}, "model_type='bert': only nanochat, llama, gpt2"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type='dynamic', but jaxchat supports",
    ),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "rope_scaling in config.json has type="),
    ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "has no low_freq_factor"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor=0"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"n_head": 5}, "n_head=5.* multiple of n_head"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types="),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types lists 1 layers"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "sliding_attention without a sliding_window"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("gemma3", {"rope_parameters": {"chunked_attention": {}}}, "rope_parameters has chunked_attention"),
    ("qwen3_moe", {"num_experts": 8}, "num_experts=8.*must be one number"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias=True"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads must be 4"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_what_is_not_supported_is_refused_by_its_key(name: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        families.read_config(fixed(name) | change)


HUB: dict[str, dict[str, Any]] = {  # Keys of published files that transformers' own files of today do not have.
    "gpt2": {"n_ctx": 40, "task_specific_params": {}, "n_inner": None},
    "llama": {"pretraining_tp": 1, "rope_scaling": None, "is_llama_config": True, "rope_interleaved": False},
    "llama3": {"rope_parameters": ..., "rope_theta": 500_000.0, "rope_scaling": "rope_parameters"},
    "deepseek_v3": {"ep_size": 1, "seq_aux": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "gemma3": {
        "rope_parameters": ...,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
}


@pytest.mark.parametrize("name", HUB)
def test_files_of_the_hub_describe_the_same_model(name: str) -> None:
    config = fixed(name)
    rope = {key: value for key, value in config.get("rope_parameters", {}).items() if key != "rope_theta"}
    change = {key: rope if value == "rope_parameters" else value for key, value in HUB[name].items()}
    changed = {key: value for key, value in (config | change).items() if value is not ...}
    assert families.read_config(changed) == families.read_config(config)


def test_layers_by_number_are_layers_by_type() -> None:
    qwen, gemma = fixed("qwen2"), fixed("gemma3") | {"num_hidden_layers": 7, "sliding_window_pattern": 3}
    first = families.read_config({k: v for k, v in qwen.items() if k != "layer_types"} | {"max_window_layers": 1})
    assert first == families.read_config(qwen)
    model, _ = families.read_config(gemma | {"layer_types": None})
    assert [m.window for m in model.mixers] == [4, 4, None, 4, 4, None, 4]
    assert (len(model.pattern), len(model.tail)) == (3, 1)


def test_tensors_that_are_missing_or_more_or_of_other_shapes_are_named() -> None:
    config, weights = source("deepseek_v3")
    family, model, _ = imported("deepseek_v3")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    changes = {
        f"{name} is missing": {key: value for key, value in weights.items() if key != name},
        "unexpected parameters: other": weights | {"other": weights[name]},
        f"{name} has shape": weights | {name: weights[name].T},
        "kv_b_proj.weight has shape": {
            key: value[1:] if key.endswith("0.self_attn.kv_b_proj.weight") else value for key, value in weights.items()
        },
    }
    for words, changed in changes.items():
        with pytest.raises(ValueError, match=words.replace(".", r"\.")):
            to_params(model, changed, family.places)
    assert config["model_type"] == family.model_type


def test_weights_in_bfloat16_stay_so_but_for_routers() -> None:
    _, weights = source("deepseek_v3")
    family, model, _ = imported("deepseek_v3")
    params = to_params(model, weights, family.places, jnp.bfloat16)
    exact = [leaf for leaf in jax.tree.leaves(params) if leaf.dtype == np.float32]
    assert [leaf.shape for leaf in exact] == [(1, 32, 8), (1, 8)] or len(exact) == 2
    assert all(leaf.dtype in (jnp.bfloat16, np.float32) for leaf in jax.tree.leaves(params))


def test_a_family_that_is_exported_as_another_has_the_same_model() -> None:
    """Mistral without a window is Llama."""
    model, length = families.read_config(fixed("mistral") | {"sliding_window": None})
    family = families.family_of(model)
    assert family.model_type == "llama"
    assert families.read_config({"model_type": "llama", **family.write(model, length)})[0] == model
    assert huggingface.family_of is families.family_of


def test_a_wrong_weight_in_any_tensor_is_found_and_named() -> None:
    for name in ("gpt2", "deepseek_v3"):
        _, weights = source(name)
        family, model, _ = imported(name)
        for key, value in weights.items():
            wrong = value.copy()
            wrong.flat[-1] += 1 / 64
            params = to_params(model, weights | {key: wrong}, family.places)
            with pytest.raises(UserError, match=re.escape(f"{key} differs from the one in here")):
                verify.same_tensors(State(model, params, family.places), weights, "here")
        verify.same_tensors(State(model, imported(name)[2], family.places), weights, "here")


def test_the_first_layer_that_differs_is_named() -> None:
    _, model, params = imported("gemma3")
    right = verify.run_ours(model, params, 8192)
    at = verify.positions(8192)
    assert len(at) == 48 and at.max() == 4111 and len(right.streams) == model.depth == 3
    verify.same_logits(right, right._replace(logits=right.logits * (1 + 1e-5)), "transformers")

    def wrong(change: Any) -> Any:
        return verify.run_ours(model, jax.tree_util.tree_map_with_path(change, params), 8192)

    def at_path(wanted: str) -> Any:
        return lambda path, leaf: leaf + np.resize((0, 0.05), leaf.shape) * (wanted in jax.tree_util.keystr(path))

    for path, words in {
        "['embed']": "the embedding computes",
        "['layers'][0]['mixer']['v']": "layer 0 computes",
        "['layers'][1]['mlp']['out']": "layer 1 computes",
        "['layers'][2]['mlp']['out']": "layer 2, the final norm or the head computes",
        "['final_norm']": "layer 2, the final norm or the head computes",
    }.items():
        with pytest.raises(UserError, match=re.escape(words)):
            verify.same_logits(wrong(at_path(path)), right, "transformers")
    other = dataclasses.replace(model, pattern=tuple(map(without_scaling, model.pattern)))
    with pytest.raises(UserError, match="layer 1 computes"):
        verify.same_logits(verify.run_ours(other, params, 8192), right, "transformers")


def test_experts_are_compared_too() -> None:
    _, model, params = imported("mixtral")
    at, ids = verify.positions(8192), verify.tokens(model, 8192)
    transformer = Transformer(model)
    forward = transformer.apply(params, jnp.asarray(ids[None]), positions_BT=jnp.asarray(at[None]))
    found = verify.run_ours(model, jax.tree.map(np.asarray, params), 8192)
    np.testing.assert_allclose(found.logits, transformer.logits(params, forward.hidden)[0], atol=1e-5)


def without_scaling(layer: Layer) -> Layer:
    rope = dataclasses.replace(layer.mixer.positions, scaling=None)
    return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, positions=rope))
