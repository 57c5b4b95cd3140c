"""transformers' NanoChatForCausalLM, which is the October 2025 family.

Like this family, transformers normalises the embedding before the first layer, rotates by -theta, and normalises
queries and keys after the rotation. Its configuration defaults are those of one published model, so config.json states
all sizes and special ids.
"""

from collections.abc import Mapping
from typing import Any

from jaxchat.errors import UserError
from jaxchat.export.places import Family, Place
from jaxchat.model import GQA, Layer, Model, ReluSquared, RMSNorm, RoPE

PLACES = {
    ("embed",): Place("model.embed_tokens.weight", linear=False),
    ("head",): Place("lm_head.weight"),
    ("mixer", "q"): Place("model.layers.{}.self_attn.q_proj.weight"),
    ("mixer", "k"): Place("model.layers.{}.self_attn.k_proj.weight"),
    ("mixer", "v"): Place("model.layers.{}.self_attn.v_proj.weight"),
    ("mixer", "o"): Place("model.layers.{}.self_attn.o_proj.weight"),
    ("mlp", "in"): Place("model.layers.{}.mlp.fc1.weight"),
    ("mlp", "out"): Place("model.layers.{}.mlp.fc2.weight"),
}


def lacking(model: Model) -> list[str]:
    """The features of the model that NanoChatForCausalLM does not have."""
    layer, mixers = model.pattern[0], [layer.mixer for layer in model.pattern]
    mixer = mixers[0]
    if not all(isinstance(m, GQA) for m in mixers):
        return ["mixers other than grouped-query attention"]
    features = {
        "layers of different kinds": len(set(model.pattern)) > 1,
        "norms other than before each mixer and MLP": (layer.placement, layer.norm) != ("before", model.norm),
        "windows": any(m.window is not None for m in mixers),
        "value embeddings": any(m.value_embedding is not None for m in mixers),
        "a smear": model.smear is not None,
        "a backout": model.backout is not None,
        "scales of the residual stream": model.residual_scales is not None,
        f"queries and keys scaled by {mixer.qk_scale}": mixer.qk_scale != 1.0,
        "a norm of queries and keys that differs from the other norms": mixer.qk_norm != model.norm,
        "position embeddings other than RoPE by -theta": getattr(mixer.positions, "direction", 0) != -1,
        f"{type(layer.mlp).__name__} layers": not isinstance(layer.mlp, ReluSquared),
    }
    return [name for name, is_used in features.items() if is_used]


def write_config(model: Model) -> dict[str, Any]:
    """The model's entries of config.json."""
    mixer = model.pattern[0].mixer
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "intermediate_size": model.pattern[0].mlp.hidden,
        "num_hidden_layers": model.depth,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": "relu2",
        "attention_dropout": 0.0,
        "attention_bias": False,
        "rms_norm_eps": model.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer.positions.base},
        "final_logit_softcapping": model.softcap,
        "tie_word_embeddings": model.tied,
    }


def read_config(config: Mapping[str, Any]) -> Model:
    """The model of a config.json; raises `UserError` for settings that our model does not have."""
    rope = config.get("rope_parameters") or {}
    expected = {"hidden_act": "relu2", "attention_bias": False}
    unsupported = [f"{name}={config[name]!r}" for name, value in expected.items() if config.get(name, value) != value]
    if rope.get("rope_type", "default") != "default":
        unsupported.append(f"rope_type={rope['rope_type']!r}")
    if unsupported:
        raise UserError(f"config.json has {unsupported[0]}, which jaxchat does not support")
    heads, norm = config["num_attention_heads"], RMSNorm(config.get("rms_norm_eps", 1e-6))
    mixer = GQA(
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        positions=RoPE(float(rope.get("rope_theta", 10_000.0))),
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


FAMILY = Family("NanoChatForCausalLM", "nanochat", lacking, write_config, read_config, PLACES)
