"""Exports the October 2025 family to transformers' NanoChatForCausalLM, and imports it.

Like this family, transformers normalises the embedding before the first layer, rotates by -theta, and normalises
queries and keys after the rotation. Its configuration defaults are those of one published model, so config.json states
all sizes and special ids.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.errors import UserError, first_line
from jaxchat.export.files import DTYPES, SHARD_BYTES, read_json, read_weights, whole, write_json, write_weights
from jaxchat.export.places import HEADS_IN, HEADS_OUT, TRANSPOSED, Place, to_params, to_state
from jaxchat.export.tokens import read_tokenizer, write_tokenizer
from jaxchat.model import GQA, Layer, Model, ReluSquared, RMSNorm, RoPE
from jaxchat.model.transformer import Params
from jaxchat.tokenizer import Tokenizer

ARCHITECTURE = "NanoChatForCausalLM"

LAYERS = {
    ("mixer", "q"): Place("model.layers.{}.self_attn.q_proj.weight", HEADS_OUT),
    ("mixer", "k"): Place("model.layers.{}.self_attn.k_proj.weight", HEADS_OUT),
    ("mixer", "v"): Place("model.layers.{}.self_attn.v_proj.weight", HEADS_OUT),
    ("mixer", "o"): Place("model.layers.{}.self_attn.o_proj.weight", HEADS_IN),
    ("mlp", "in"): Place("model.layers.{}.mlp.fc1.weight", TRANSPOSED),
    ("mlp", "out"): Place("model.layers.{}.mlp.fc2.weight", TRANSPOSED),
}
ENDS = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}


def write(
    directory: Path,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    *,
    length: int,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes weights, configuration, tokenizer and chat template to a new directory; returns the number of parameters.

    `length` is the row length of training, `dtype` the type of the weights.

    Raises:
        UserError: the model has a feature that transformers lacks, or the directory is not empty.
    """
    check_exportable(model)
    with whole(directory) as place:
        write_json(place / "config.json", config_json(model, tokenizer, length=length, dtype=dtype))
        write_json(place / "generation_config.json", generation_json(tokenizer))
        write_tokenizer(place, tokenizer, length=length)
        cast = ((name, np.ascontiguousarray(w, DTYPES[dtype])) for name, w in to_state(model, params, LAYERS, ENDS))
        return write_weights(place, cast, shard_bytes=shard_bytes)


def read(directory: Path, tokenizer: Tokenizer | None = None) -> tuple[Model, int, Params, Tokenizer]:
    """Reads a NanoChatForCausalLM: model, maximum number of positions, float32 parameters and tokenizer.

    Raises:
        UserError: files are missing, describe another architecture or do not match each other.
    """
    config = read_json(directory / "config.json")
    model = read_config(config)
    tokenizer = tokenizer or read_tokenizer(directory)
    if tokenizer.vocab_size != model.vocab:
        raise UserError(
            f"{directory} has a vocabulary of {model.vocab} but its tokenizer has {tokenizer.vocab_size} ids: name the "
            "tokenizer of its training with --tokenizer=DIR"
        )
    weights = read_weights(directory)
    if model.tied:
        weights.pop(ENDS["head"], None)
    try:
        params = to_params(model, weights, LAYERS, ENDS)
    except ValueError as error:
        raise UserError(f"the weights in {directory} do not match its config.json: {first_line(error)}") from None
    return model, int(config["max_position_embeddings"]), params, tokenizer


def check_exportable(model: Model) -> None:
    """Raises `UserError` with all features of the model that NanoChatForCausalLM lacks."""
    layer, mixers = model.pattern[0], [layer.mixer for layer in model.pattern]
    mixer = mixers[0]
    lacking = {
        "layers of different kinds": len(set(model.pattern)) > 1,
        "norms other than before each mixer and MLP": (layer.placement, layer.norm) != ("before", model.norm),
        "windows": any(m.window is not None for m in mixers),
        "value embeddings": any(m.value_embedding is not None for m in mixers),
        "a smear": model.smear is not None,
        "a backout": model.backout is not None,
        "scales of the residual stream": model.residual_scales is not None,
        f"queries and keys scaled by {mixer.qk_scale}": mixer.qk_scale != 1.0,
        "a norm of queries and keys that differs from the other norms": mixer.qk_norm != model.norm,
        "position embeddings other than RoPE by -theta": mixer.rope is None or mixer.rope.direction != -1,
        f"{type(layer.mlp).__name__} layers": not isinstance(layer.mlp, ReluSquared),
    }
    if used := [name for name, is_used in lacking.items() if is_used]:
        listed = ", ".join(used[:-1]) + " and " * (len(used) > 1) + used[-1]
        raise UserError(
            f"transformers' {ARCHITECTURE} does not support {listed}, which this model uses: evaluate the checkpoint "
            "with python -m launch.harness, or export it with --to=stablehlo"
        )


def config_json(model: Model, tokenizer: Tokenizer, *, length: int, dtype: str) -> dict[str, Any]:
    """Content of config.json. There is no padding id, because torch would zero the gradient of its embedding."""
    mixer = model.pattern[0].mixer
    assert mixer.rope is not None
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "nanochat",
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "intermediate_size": model.pattern[0].mlp.hidden,
        "num_hidden_layers": model.depth,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "max_position_embeddings": length,
        "hidden_act": "relu2",
        "attention_dropout": 0.0,
        "attention_bias": False,
        "rms_norm_eps": model.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer.rope.base},
        "final_logit_softcapping": model.softcap,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.end,
        "pad_token_id": None,
        "tie_word_embeddings": model.tied,
        "use_cache": True,
        "dtype": dtype,
    }


def generation_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Content of generation_config.json. Stop tokens end the assistant's turn or begin another document."""
    bos = tokenizer.bos
    return {"bos_token_id": bos, "eos_token_id": [tokenizer.end, bos], "pad_token_id": bos}


def read_config(config: Mapping[str, Any]) -> Model:
    """Builds the model of a config.json; raises `UserError` for other architectures or unsupported settings."""
    if config.get("model_type") != "nanochat":
        kind = config.get("model_type")
        raise UserError(f"config.json has model type {kind!r}: only 'nanochat' ({ARCHITECTURE}) can be imported")
    rope = config.get("rope_parameters") or {}
    expected = {"hidden_act": "relu2", "attention_bias": False}
    unsupported = [f"{name}={config[name]!r}" for name, value in expected.items() if config.get(name, value) != value]
    if rope.get("rope_type", "default") != "default":
        unsupported.append(f"rope_type={rope['rope_type']!r}")
    if unsupported:
        raise UserError(f"config.json has {unsupported[0]}, which jaxchat does not support")
    try:
        heads, norm = config["num_attention_heads"], RMSNorm(config.get("rms_norm_eps", 1e-6))
        mixer = GQA(
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rope=RoPE(float(rope.get("rope_theta", 10_000.0))),
            qk_norm=norm,
            init="normal",
        )
        return Model(
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            depth=config["num_hidden_layers"],
            pattern=(Layer(mixer, ReluSquared(config["intermediate_size"], init="normal", init_scale=1.0), norm),),
            norm=norm,
            embed_std=1.0,
            head_std=0.0,
            tied=bool(config.get("tie_word_embeddings", False)),
            softcap=config.get("final_logit_softcapping", 15.0),
            isolate_documents=False,
        )
    except KeyError as error:
        raise UserError(f"config.json has no {error.args[0]}: check that the file is complete") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json does not describe a valid model: {first_line(error)}") from None
