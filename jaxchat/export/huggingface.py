"""The October 2025 family as transformers' NanoChatForCausalLM, both ways.

transformers normalises the embedding once more before the first layer, rotates by -theta and normalises queries and
keys after that, as this family does here; its configuration's defaults are those of one published model, so every size
and every special id is written out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.errors import UserError, first_line
from jaxchat.export.files import DTYPES, SHARD_BYTES, read_json, read_weights, whole, write_json, write_weights
from jaxchat.export.places import HEADS_IN, HEADS_OUT, TRANSPOSED, Place, to_params, to_state
from jaxchat.export.tokens import BOS, END, read_tokenizer, write_tokenizer
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
    """Writes weights, configuration, tokenizer and chat template into a new directory; returns how many parameters.

    `length` is the longest text that the model was trained on, `dtype` that of the weights.

    Raises:
        UserError: transformers lacks something that the model has, or the directory has something in it.
    """
    check_exportable(model)
    with whole(directory) as place:
        write_json(place / "config.json", config_json(model, tokenizer, length=length, dtype=dtype))
        write_json(place / "generation_config.json", generation_json(tokenizer))
        write_tokenizer(place, tokenizer, length=length)
        cast = ((name, np.ascontiguousarray(w, DTYPES[dtype])) for name, w in to_state(model, params, LAYERS, ENDS))
        return write_weights(place, cast, shard_bytes=shard_bytes)


def read(directory: Path, tokenizer: Tokenizer | None = None) -> tuple[Model, int, Params, Tokenizer]:
    """Model, its longest text, float32 parameters and tokenizer of a NanoChatForCausalLM in a directory.

    Raises:
        UserError: there is none, it is of another kind, or its files do not fit each other.
    """
    config = read_json(directory / "config.json")
    model = read_config(config)
    tokenizer = tokenizer or read_tokenizer(directory)
    if tokenizer.vocab_size != model.vocab:
        raise UserError(
            f"{directory} has a vocabulary of {model.vocab} and its tokenizer {tokenizer.vocab_size} ids: name the "
            "tokenizer that it was trained with by --tokenizer=DIR"
        )
    weights = read_weights(directory)
    if model.tied:
        weights.pop(ENDS["head"], None)
    try:
        params = to_params(model, weights, LAYERS, ENDS)
    except ValueError as error:
        raise UserError(f"the weights in {directory} do not fit its config.json: {first_line(error)}") from None
    return model, int(config["max_position_embeddings"]), params, tokenizer


def check_exportable(model: Model) -> None:
    """Raises `UserError` naming everything that NanoChatForCausalLM lacks."""
    layer, mixers = model.pattern[0], [layer.mixer for layer in model.pattern]
    mixer = mixers[0]
    lacking = {
        "layers that differ": len(set(model.pattern)) > 1,
        "norms elsewhere than before each part": (layer.placement, layer.norm) != ("before", model.norm),
        "windows": any(m.window is not None for m in mixers),
        "value embeddings": any(m.value_embedding is not None for m in mixers),
        "a smear": model.smear is not None,
        "a backout": model.backout is not None,
        "scales of the residual stream": model.residual_scales is not None,
        f"queries and keys scaled by {mixer.qk_scale}": mixer.qk_scale != 1.0,
        "queries and keys that are not normalised as the rest is": mixer.qk_norm != model.norm,
        "its kind of positions": mixer.rope is None or mixer.rope.direction != -1,
        f"{type(layer.mlp).__name__} layers": not isinstance(layer.mlp, ReluSquared),
    }
    if found := [name for name, there in lacking.items() if there]:
        listed = ", ".join(found[:-1]) + " and " * (len(found) > 1) + found[-1]
        raise UserError(
            f"transformers' {ARCHITECTURE} does not know {listed}, which this model has: score it where it is with "
            "python -m launch.harness, or take --to=stablehlo"
        )


def config_json(model: Model, tokenizer: Tokenizer, *, length: int, dtype: str) -> dict[str, Any]:
    """The content of config.json. There is no padding id: torch would take the gradient of its embedding away."""
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
        "bos_token_id": tokenizer.specials[BOS],
        "eos_token_id": tokenizer.specials[END],
        "pad_token_id": None,
        "tie_word_embeddings": model.tied,
        "use_cache": True,
        "dtype": dtype,
    }


def generation_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of generation_config.json: an answer ends where a turn ends, a text where the next would begin."""
    bos = tokenizer.specials[BOS]
    return {"bos_token_id": bos, "eos_token_id": [tokenizer.specials[END], bos], "pad_token_id": bos}


def read_config(config: Mapping[str, Any]) -> Model:
    """The model that a config.json describes; `UserError` where it is no NanoChatForCausalLM or of an unknown kind."""
    if config.get("model_type") != "nanochat":
        kind = config.get("model_type")
        raise UserError(f"config.json is of the model type {kind!r}: only 'nanochat' ({ARCHITECTURE}) can be read")
    rope = config.get("rope_parameters") or {}
    expected = {"hidden_act": "relu2", "attention_bias": False}
    strange = [f"{name}={config[name]!r}" for name, value in expected.items() if config.get(name, value) != value]
    if rope.get("rope_type", "default") != "default":
        strange.append(f"rope_type={rope['rope_type']!r}")
    if strange:
        raise UserError(f"config.json has {strange[0]}, which jaxchat's models do not have")
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
        raise UserError(f"config.json has no {error.args[0]}: is it whole?") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json describes no model: {first_line(error)}") from None
