"""Conversions through launch.convert: they work in both directions, or refuse by name and write nothing."""

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exports import VOCAB, read_export, tokenizer
from safetensors.numpy import load_file
from weights import random_weight

import launch.convert
from configs import families as presets
from configs import recipe
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.export import families, huggingface
from jaxchat.export.files import write_json, write_weights
from jaxchat.export.places import State
from jaxchat.export.tokens import write_tokenizer
from jaxchat.loading import load_checkpoint, load_engine
from jaxchat.model import Transformer

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "kv_lora_rank": 12,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
WRONG = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers writes it, of random weights."""
    place = tmp_path_factory.mktemp("source")
    model, _ = families.read_config(CONFIG)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), Transformer(model).shapes())
    shapes = {name: value.shape for name, value in State(model, params, families.named(CONFIG).places).items()}
    write_json(place / "config.json", CONFIG)
    write_tokenizer(place, tokenizer(), length=64)
    weights = {name: random_weight(name, shape, scale=0.2) for name, shape in shapes.items()}
    weights["model.layers.1.mlp.gate.weight"] += 1 / 3  # A router, which bfloat16 would round.
    write_weights(place, weights)
    return place


def test_an_imported_model_decodes_in_bfloat16_and_goes_out_with_the_same_bits(source: Path, tmp_path: Path) -> None:
    run = f"{tmp_path}/run/pretrain"
    launch.convert.main([f"--checkpoint={source}", "--from=huggingface", f"--out={run}", "--dtype=bfloat16"])
    loaded = load_checkpoint(run)
    assert loaded.experiment.dtype == "bfloat16" and loaded.transformer().dtype == jnp.bfloat16
    params, specs = loaded.params(), Transformer(loaded.experiment.model).specs()
    for leaf, spec in zip(jax.tree.leaves(params), jax.tree.leaves(specs), strict=True):
        assert leaf.dtype == (jnp.float32 if spec.exact else jnp.bfloat16)
    engine = load_engine(run, length=32)
    (answer,) = engine.generate([Request([1, 2, 3], SamplingParams(0.0, max_tokens=5))])[0]
    assert len(answer.tokens) == 5 or answer.tokens[-1] in engine.ends
    out = tmp_path / "out"
    launch.convert.main([f"--checkpoint={run}", "--to=huggingface", f"--out={out}", "--dtype=bfloat16"])
    ours, theirs = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name].astype(value.dtype), err_msg=name)
    config = json.loads((out / "config.json").read_text())
    assert families.read_config(config) == families.read_config(CONFIG)


def test_a_wrong_weight_stops_an_import(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = State.put
    monkeypatch.setattr(State, "put", lambda state, name, value: put(state, name, value + (name == WRONG)))
    with pytest.raises(UserError, match=rf"{WRONG} differs from the one in .*: nothing was written"):
        launch.convert.main([f"--checkpoint={source}", "--from=huggingface", f"--out={tmp_path}/run/sft"])
    assert not list(tmp_path.glob("run/*"))


def test_a_wrong_weight_stops_an_export(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, params, words = read_export(source)

    def write(place: Path, state: Any) -> int:
        return write_weights(place, {name: value + (name == WRONG) for name, value in state.items()})

    monkeypatch.setattr(huggingface, "write_weights", write)
    with pytest.raises(UserError, match=f"{WRONG} differs from"):
        huggingface.write(tmp_path / "out", model, params, words, length=64)
    assert not list(tmp_path.iterdir())


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("content", ["bomb", "list", "weights"])
def test_files_of_torch_are_read_without_executing_them(
    content: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, weights = tmp_path / "there", load_file(source / "model.safetensors")
    place.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (place / path.name).write_bytes(path.read_bytes())
    file = place / "pytorch_model.bin"
    file.write_bytes(pickle.dumps(Bomb()))
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("torch") is None:
        words = "only torch can read safely: pip install"
    else:
        import torch

        words = "without executing code" if content == "bomb" else "is not a state dict"
        if content != "bomb":
            kinds = {name: "float32" if "gate.weight" in name else "bfloat16" for name in weights}
            tensors = {name: torch.from_numpy(weights[name]).to(getattr(torch, kind)) for name, kind in kinds.items()}
            torch.save([1] if content == "list" else tensors, file)
        if content == "weights":
            _, _, params, _ = read_export(place)
            model, _ = families.read_config(CONFIG)
            for name, value in State(model, params, families.named(CONFIG).places).items():
                np.testing.assert_array_equal(value, weights[name], err_msg=name)
            return
    with pytest.raises(UserError, match=words):
        launch.convert.main([f"--checkpoint={place}", "--from=huggingface", f"--out={tmp_path}/run/sft"])
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "olmo2", "gemma3", "deepseek", "october2025"])
def test_presets_of_families_go_out_as_their_families(name: str) -> None:
    model = presets.FAMILIES[name].model(recipe.Dial(depth=4, family=name, vocab=420, row_length=256))
    wanted = {"deepseek": "deepseek_v3", "gemma3": "gemma3_text", "october2025": "nanochat"}.get(name, name)
    assert families.family_of(model).model_type == wanted
