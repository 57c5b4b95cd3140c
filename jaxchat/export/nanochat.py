"""transformers' NanoChatForCausalLM, which is the October 2025 family.

Like this family, transformers normalises the embedding before the first layer, rotates by -theta, and normalises
queries and keys after the rotation. Its configuration defaults are those of one published model, so config.json states
all sizes and special ids.
"""

from collections.abc import Mapping
from typing import Any

from jaxchat.errors import UserError
from jaxchat.export.places import POSITIVE, WHOLE, Family, Key, Place, only, read_keys, whole
from jaxchat.model import GQA, Layer, Model, ReluSquared, RMSNorm, RoPE

SIZES = "num_hidden_layers, hidden_size, num_attention_heads, num_key_value_heads and head_dim"
PLACES = {
    ("embed",): Place("model.embed_tokens.weight", linear=False, keys="vocab_size and hidden_size"),
    ("head",): Place("lm_head.weight", keys="tie_word_embeddings, vocab_size and hidden_size"),
    ("mixer", "q"): Place("model.layers.{}.self_attn.q_proj.weight", keys=SIZES),
    ("mixer", "k"): Place("model.layers.{}.self_attn.k_proj.weight", keys=SIZES),
    ("mixer", "v"): Place("model.layers.{}.self_attn.v_proj.weight", keys=SIZES),
    ("mixer", "o"): Place("model.layers.{}.self_attn.o_proj.weight", keys=SIZES),
    ("mlp", "in"): Place("model.layers.{}.mlp.fc1.weight", keys="num_hidden_layers and intermediate_size"),
    ("mlp", "out"): Place("model.layers.{}.mlp.fc2.weight", keys="num_hidden_layers and intermediate_size"),
}

# Keys of config.json. Every other key is in NEUTRAL, or the model is refused.
KEYS: Mapping[str, Key] = {
    "vocab_size": WHOLE,
    "hidden_size": WHOLE,
    "intermediate_size": WHOLE,
    "num_hidden_layers": whole(most=10_000),
    "num_attention_heads": WHOLE,
    "num_key_value_heads": WHOLE.or_null(),
    "head_dim": WHOLE._replace(default=None),
    "max_position_embeddings": whole(least=2),
    "rms_norm_eps": POSITIVE._replace(default=1e-6),
    "final_logit_softcapping": POSITIVE.or_null()._replace(default=15.0),
    "rope_theta": POSITIVE._replace(default=None),
    **dict.fromkeys(
        ("rope_parameters", "rope_scaling"), Key(lambda value: isinstance(value, dict), "an object").or_null()
    ),
    "tie_word_embeddings": Key(lambda value: isinstance(value, bool), "true or false", False),
    "hidden_act": only("relu2"),
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "qkv_bias", "use_sliding_window", "is_encoder_decoder"), only(False)
    ),
    **dict.fromkeys(("sliding_window", "quantization_config", "per_layer_config"), only(None)),
    "partial_rotary_factor": only(None, 1),
}
# Settings of training, generation, dtypes and classifiers, which do not change the logits of a language model.
NEUTRAL_LINES = (
    "model_type architectures dtype torch_dtype transformers_version name_or_path _name_or_path num_labels",
    "attention_dropout initializer_range use_cache bos_token_id eos_token_id pad_token_id id2label label2id",
    "attn_implementation _attn_implementation output_attentions output_hidden_states return_dict problem_type",
    "chunk_size_feed_forward",
)
NEUTRAL = frozenset(name for line in NEUTRAL_LINES for name in line.split())
ROPE: Mapping[str, Key] = {
    **dict.fromkeys(("rope_type", "type"), only("default")),
    **{name: KEYS[name] for name in ("rope_theta", "partial_rotary_factor")},
}


def lacking(model: Model) -> list[str]:
    """The features of the model that NanoChatForCausalLM does not have."""
    layer, mixers = model.pattern[0], list(model.mixers)
    mixer = mixers[0]
    if not all(isinstance(m, GQA) for m in mixers):
        return ["mixers other than grouped-query attention"]
    plain = GQA(mixer.heads, mixer.kv_heads, mixer.head_dim)
    later = ("qk_norm_first", "qk_norm_whole", "qkv_bias", "o_bias", "scale", "softcap", "sinks")
    changed = [f"{name}={getattr(mixer, name)}" for name in later if getattr(mixer, name) != getattr(plain, name)]
    features = {
        "layers of different kinds": len(set(model.layers)) > 1,
        "norms other than RMSNorm without gain and bias": model.norm != RMSNorm(getattr(model.norm, "eps", 0.0)),
        "a model without norms of embedding and output": not (model.embed_norm and model.final_norm),
        f"an embedding scaled by {model.embed_scale}": model.embed_scale != 1.0,
        f"attention with {', '.join(changed)}": bool(changed),
        "biases": getattr(layer.mlp, "bias", False),
        "norms other than before each mixer and MLP": (layer.placement, layer.norm) != ("before", model.norm),
        "windows": any(m.window is not None for m in mixers),
        "value embeddings": any(m.value_embedding is not None for m in mixers),
        "a smear": model.smear is not None,
        "a backout": model.backout is not None,
        "scales of the residual stream": model.residual_scales is not None,
        f"queries and keys scaled by {mixer.qk_scale}": mixer.qk_scale != 1.0,
        "a norm of queries and keys that differs from the other norms": mixer.qk_norm != model.norm,
        "position embeddings other than RoPE by -theta": (p := mixer.positions) != RoPE(getattr(p, "base", 0.0)),
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


def read_config(config: Mapping[str, Any]) -> tuple[Model, int]:
    """The model of a config.json and its maximum number of positions; raises `UserError` naming a wrong key.

    Defaults of missing keys, and the places of the base of RoPE, are those of transformers.
    """
    c = read_keys(config, KEYS, "config.json", NEUTRAL)
    heads, norm = c["num_attention_heads"], RMSNorm(c["rms_norm_eps"])
    kv_heads, head_dim = c["num_key_value_heads"] or heads, c["head_dim"] or c["hidden_size"] // heads
    try:
        mixer = GQA(heads, kv_heads, head_dim, positions=RoPE(_base(c)), qk_norm=norm, init="normal")
    except ValueError as error:
        sizes = f"hidden_size={c['hidden_size']}, num_attention_heads={heads} and num_key_value_heads={kv_heads}"
        raise UserError(f"config.json has {sizes}, but {error}") from None
    model = Model(
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        pattern=(Layer(mixer, ReluSquared(c["intermediate_size"], init="normal", init_scale=1.0), norm),),
        norm=norm,
        embed_std=1.0,
        head_std=0.0,
        tied=c["tie_word_embeddings"],
        softcap=c["final_logit_softcapping"],
        isolate_documents=False,
    )
    return model, c["max_position_embeddings"]


def _base(c: Mapping[str, Any]) -> float:
    """The base of RoPE: `rope_theta` in rope_parameters, in rope_scaling (its older name) or beside them."""
    named = {name: c[name] for name in ("rope_parameters", "rope_scaling") if c[name]}
    parts = [read_keys(part, ROPE, f"{name} in config.json", frozenset()) for name, part in named.items()]
    bases = {float(part["rope_theta"]) for part in (*parts, c) if part["rope_theta"] is not None}
    if len(parts) > 1 or len(bases) > 1:
        raise UserError(
            f"config.json has rope_theta={c['rope_theta']}, rope_parameters={c['rope_parameters']} and "
            f"rope_scaling={c['rope_scaling']}: keep the one that the model was trained with"
        )
    return bases.pop() if bases else 10_000.0


FAMILY = Family("NanoChatForCausalLM", "nanochat", lacking, write_config, read_config, PLACES)
