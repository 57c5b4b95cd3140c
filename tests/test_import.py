"""A model of transformers is imported with the same logits, or refused by the name of what is wrong."""

import dataclasses
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import small
from exports import VOCAB, model, read_export, tokenizer
from safetensors.numpy import load_file, save_file

from jaxchat.errors import UserError
from jaxchat.export import families, huggingface
from jaxchat.export.families.keys import NEUTRAL
from jaxchat.model import GQA, Model, RMSNorm, Transformer

GROUPED = model(width=32, pattern=(GQA(heads=4, kv_heads=2, head_dim=8, init="normal"),))
TOKENS = np.random.default_rng(7).integers(0, VOCAB, (1, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export") / "plain"
    huggingface.write(place, GROUPED, small.parameters(GROUPED), tokenizer(), length=64)
    return place


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dataclasses.replace(GROUPED, tied=True, softcap=None)
    place = tmp_path_factory.mktemp("export") / "tied"
    huggingface.write(place, config, small.parameters(config), tokenizer(), length=64)
    return place


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def changed(source: Path, config: Any, to: Path) -> Path:
    """The directory with another config.json."""
    shutil.copytree(source, to, dirs_exist_ok=True)
    (to / "config.json").write_text(json.dumps(config))
    return to


def read(directory: Path) -> tuple[Model, Any]:
    config, _, params, _ = read_export(directory, tokenizer())
    return config, params


def altered(value: Any, how: str) -> Any:
    if how == "null":
        return None
    if isinstance(value, bool):
        return 2 * value if how == "doubled" else not value
    if isinstance(value, int | float):
        return 2 * value if how == "doubled" else -value
    return value * 2 if isinstance(value, str | list) and how == "doubled" else f"not {value}"


def mutations(config: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The configuration with each key, also of nested objects, removed, nulled, doubled and negated."""
    for key, value in config.items():
        yield key, "removed", {name: other for name, other in config.items() if name != key}
        yield from ((key, how, config | {key: altered(value, how)}) for how in ("null", "doubled", "negated"))
        if isinstance(value, dict):
            yield from ((inner, how, config | {key: change}) for inner, how, change in mutations(value))


def intended(config: Model, key: str, how: str) -> Model:
    """The model that a mutated key describes to transformers; most keys leave it as it is or are refused."""
    layer, factor = config.pattern[0], 2.0 if how == "doubled" else 1.0
    if key == "rms_norm_eps":
        norm = RMSNorm(config.norm.eps * factor)
        mixer = dataclasses.replace(layer.mixer, qk_norm=norm)
        return dataclasses.replace(config, norm=norm, pattern=(dataclasses.replace(layer, mixer=mixer, norm=norm),))
    if key == "rope_theta":
        rope = dataclasses.replace(layer.mixer.positions, base=layer.mixer.positions.base * factor)
        mixer = dataclasses.replace(layer.mixer, positions=rope)
        return dataclasses.replace(config, pattern=(dataclasses.replace(layer, mixer=mixer),))
    if key == "final_logit_softcapping":
        softcaps = {"removed": 15.0, "null": None, "doubled": 2 * config.softcap if config.softcap else None}
        return dataclasses.replace(config, softcap=softcaps[how])
    return config


def saved_by_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of transformers' `NanoChatConfig.to_dict`: no head_dim, and settings that change nothing."""
    more = {
        "transformers_version": "5.23.0",
        "output_hidden_states": False,
        "return_dict": True,
        "chunk_size_feed_forward": 0,
        "is_encoder_decoder": False,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "problem_type": None,
        "initializer_range": 0.02,
        "_name_or_path": "",
        "output_attentions": False,
    }
    return {name: value for name, value in config.items() if name != "head_dim"} | more


def imported_mutations(source: Path, config: dict[str, Any], place: Path) -> Iterator[tuple[str, str, Path]]:
    """Checks each mutation, and yields those that were imported."""
    original, _ = read(source)
    directory = changed(source, config, place)
    for key, how, mutated in mutations(config):
        (directory / "config.json").write_text(json.dumps(mutated))
        try:
            found, _ = families.read_config(mutated)
            if found != original:
                read(directory)  # The weights may not match.
        except UserError as error:
            assert key in str(error), f"{key} {how}: {error}"
            continue
        assert found == intended(original, key, how), f"{key} {how}"
        yield key, how, directory


@pytest.mark.parametrize("kind", ["exported", "saved", "tied"])
def test_every_mutated_key_is_read_as_transformers_does_or_refused_by_name(
    kind: str, exported: Path, tied: Path, tmp_path: Path
) -> None:
    source = tied if kind == "tied" else exported
    if kind == "saved":
        source = changed(source, saved_by_transformers(config_of(source)), tmp_path / "saved")
    accepted = {key for key, _, _ in imported_mutations(source, config_of(source), tmp_path / "mutated")}
    assert {"rms_norm_eps", "rope_theta", "final_logit_softcapping", "max_position_embeddings"} <= accepted
    assert not {"model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"} & accepted


@pytest.mark.parametrize("kind", ["exported", "tied"])
def test_mutated_configurations_that_are_imported_have_the_logits_of_transformers(
    kind: str, exported: Path, tied: Path, tmp_path: Path
) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    errors, compared = pytest.importorskip("huggingface_hub.errors"), set()
    source, logits = tied if kind == "tied" else exported, dict[Model, Any]()
    for key, how, directory in imported_mutations(source, config_of(source), tmp_path / "mutated"):
        try:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
        except (errors.StrictDataclassError, AttributeError):  # It checks settings that are neutral here, like dtype.
            continue
        compared.add(key)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
        found, params = read(directory)
        if found not in logits:
            transformer = Transformer(found)
            logits[found] = np.asarray(transformer.logits(params, transformer.apply(params, TOKENS)[0]))
        assert np.abs(logits[found] - expected).max() < 1e-4, f"{key} {how}"
    assert {"rms_norm_eps", "rope_theta", "final_logit_softcapping", "max_position_embeddings"} <= compared


JUNK = (None, 0, -1, 1, 2**31 - 1, 2**64, 0.5, 1e-300, 1e300, math.nan, math.inf, True, False, "", "1", [], [1], {})


def test_junk_in_any_known_key_is_a_model_or_refused_by_name(exported: Path) -> None:
    config = config_of(exported)
    rope = config["rope_parameters"]
    known = (*families.FAMILIES["nanochat"].keys, *NEUTRAL, "other")
    changes = [(key, value, {key: value}) for key in known for value in JUNK]
    within = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    changes += [(key, value, {"rope_parameters": rope | {key: value}}) for key in within for value in JUNK]
    for key, value, change in changes:
        try:
            _, length = families.read_config(config | change)
        except UserError as error:
            assert f"{key}=" in str(error), f"{key}={value}: {error}"
        else:
            assert length > 1 and key != "other"
    with pytest.raises(UserError, match="num_hidden_layers=2147483647"):  # Its layers would be listed one by one.
        families.read_config(config | {"num_hidden_layers": 2**31 - 1})


@pytest.mark.parametrize("key", ["rope_theta", "hidden_size"])
def test_of_a_key_that_is_written_twice_the_last_counts_as_in_transformers(
    key: str, exported: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace(f'"{key}"', f'"{key}": 7, "{key}"'))
    assert read(directory)[0] == read(exported)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": ..., "rope_theta": 500_000.0},
        {"rope_parameters": None, "rope_theta": 500_000},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500_000.0},
        {"rope_parameters": ..., "rope_scaling": {"type": "default", "rope_theta": 500_000.0}},
        {"rope_parameters": {"rope_theta": 500_000.0, "partial_rotary_factor": 1.0}, "rope_theta": 500_000.0},
        {"rope_parameters": {"rope_theta": 500_000.0}, "rope_scaling": None, "sliding_window": None},
    ],
)
def test_the_base_of_rope_is_found_wherever_transformers_finds_it(
    change: dict[str, Any], exported: Path, tmp_path: Path
) -> None:
    config = {name: value for name, value in (config_of(exported) | change).items() if value is not ...}
    found, _ = read(changed(exported, config, tmp_path))
    assert found.pattern[0].mixer.positions.base == 500_000.0


REFUSED: dict[str, dict[str, Any]] = {
    "rope_scaling in config.json has rope_type='linear', but jaxchat supports only": {
        "rope_parameters": None,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "rope_type='yarn'": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0}},
    "type='linear'": {"rope_parameters": None, "rope_scaling": {"type": "linear"}},
    "partial_rotary_factor=0.5": {"partial_rotary_factor": 0.5},
    "rope_parameters in config.json has partial_rotary_factor=0.5": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "rope_parameters in config.json has full_attention": {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
    "rope_theta=20000.0, rope_parameters=": {"rope_theta": 20_000.0},
    "rope_scaling={'rope_type'": {"rope_scaling": {"rope_type": "default"}},
    "sliding_window=3": {"sliding_window": 3},
    "layer_types=": {"layer_types": ["sliding_attention"] * 2},
    "quantization_config=": {"quantization_config": {"bits": 8}},
    "attention_bias=True": {"attention_bias": True},
    "logit_scale=0.5, which jaxchat does not know: remove logit_scale": {"logit_scale": 0.5},
    "rms_norm_eps=1e-50": {"rms_norm_eps": 1e-50},
    "rms_norm_eps=nan": {"rms_norm_eps": float("nan")},
    "num_attention_heads=True": {"num_attention_heads": True},
    "num_hidden_layers=2.0": {"num_hidden_layers": 2.0},
    "hidden_size='16'": {"hidden_size": "16"},
    "model_type=\\['nanochat'\\]": {"model_type": ["nanochat"]},
    "tie_word_embeddings=true": {"tie_word_embeddings": True},
    "final_logit_softcapping=0,": {"final_logit_softcapping": 0},
}


@pytest.mark.parametrize("words", REFUSED)
def test_keys_that_change_the_model_are_refused_by_name(words: str, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read(changed(exported, config_of(exported) | REFUSED[words], tmp_path))


def weights_of(directory: Path) -> dict[str, np.ndarray]:
    return dict(load_file(directory / "model.safetensors"))


def as_shards(directory: Path, index: Any) -> None:
    """Replaces the weights by two shards, with an index of this content unless it is None."""
    weights = weights_of(directory)
    (directory / "model.safetensors").unlink()
    for number, names in enumerate((sorted(weights)[:4], sorted(weights)[4:])):
        save_file({name: weights[name] for name in names}, directory / f"shard-{number}.safetensors")
    if index is not None:
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def good_index(directory: Path) -> dict[str, Any]:
    names = sorted(weights_of(directory))
    return {"weight_map": {name: f"shard-{int(i >= 4)}.safetensors" for i, name in enumerate(names)}}


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def test_shards_with_their_index_are_the_same_weights(exported: Path, copy: Path) -> None:
    as_shards(copy, good_index(copy))
    for ours, theirs in zip(jax.tree.leaves(read(copy)[1]), jax.tree.leaves(read(exported)[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (None, "shard-0.safetensors needs its model.safetensors.index.json"),
        ([], "index.json is not a JSON object"),
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": {"lm_head.weight": 3}}, "has no weight_map"),
        ({"weight_map": {"lm_head.weight": "../shard-0.safetensors"}}, "no ../shard-0.safetensors in"),
        ({"weight_map": {"lm_head.weight": "shard-2.safetensors"}}, "no shard-2.safetensors in"),
        (
            {"weight_map": {"lm_head.weight": "shard-0.safetensors"}},
            "not match shard-0.safetensors in model.embed",
        ),
    ],
)
def test_an_index_that_is_missing_or_wrong_is_one_sentence(index: Any, words: str, copy: Path) -> None:
    as_shards(copy, index)
    with pytest.raises(UserError, match=re.escape(words)):
        read(copy)


def test_an_index_of_other_weights_is_refused(copy: Path) -> None:
    weights, index = weights_of(copy), good_index(copy)
    as_shards(copy, index | {"weight_map": {**index["weight_map"], "extra": "shard-1.safetensors"}})
    with pytest.raises(UserError, match=r"does not match shard-1\.safetensors in extra"):
        read(copy)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"both model\.safetensors and .*: remove the one"):
        read(copy)
    (copy / "model.safetensors.index.json").unlink()
    read(copy)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e25])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, copy: Path) -> None:
    weights = weights_of(copy)
    weights["lm_head.weight"][3, 1] = value
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(
        UserError, match=r"not finite in float32 \(NaN, infinity or squares beyond it\) in lm_head.weight"
    ):
        read(copy)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.bool_, ml_dtypes.float8_e4m3fn])
def test_quantized_weights_are_refused_by_name(dtype: Any, copy: Path) -> None:
    weights = weights_of(copy)
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(dtype)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight of type .*: only unquantized weights"):
        read(copy)


def test_float64_beyond_float32_is_not_finite(copy: Path) -> None:
    weights = weights_of(copy)
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(np.float64) * 1e39
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(UserError, match="not finite in float32"):
        read(copy)


def test_a_configuration_nested_without_end_is_one_sentence(copy: Path) -> None:
    (copy / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read(copy)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_of_an_export_have_the_mode_of_new_files(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        huggingface.write(tmp_path / "out", GROUPED, small.parameters(GROUPED), tokenizer(), length=64)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}
