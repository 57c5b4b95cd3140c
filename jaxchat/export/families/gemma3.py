"""Gemma 3 without images: norms on both sides of a sublayer with factors 1 + w, and two kinds of layers."""

import dataclasses
from typing import Any

from jaxchat.export.families.keys import LAYER_TYPES, OBJECT, POSITIVE, WHOLE, WINDOW, Config, flag, only, read_rope
from jaxchat.export.families.keys import write_rope as rope_of
from jaxchat.export.families.llama import ATTENTION, DENSE, ENDS, KEYS, QK_NORM, SIZED, Llama, norms
from jaxchat.model import GQA, GeGLU, Model, RMSNorm, RoPE

NAMES = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
ORDER = ("mixer_norm", "mixer_norm_after", "mlp_norm", "mlp_norm_after")
GELU = "gelu_pytorch_tanh"
PATTERN = WHOLE._replace(default=6)


class Gemma3(Llama):
    """Most layers have a window and a base of their own; `query_pre_attn_scalar` is the scores' divisor, squared."""

    architecture, model_type = "Gemma3ForCausalLM", "gemma3_text"
    keys = {name: key for name, key in KEYS.items() if name != "hidden_act"} | {
        "num_key_value_heads": SIZED,
        "head_dim": WHOLE,
        "attention_bias": flag(False),
        "tie_word_embeddings": flag(True),
        "hidden_activation": only(GELU),
        "query_pre_attn_scalar": POSITIVE._replace(default=256),
        "rope_local_base_freq": POSITIVE._replace(default=None),
        "sliding_window": WINDOW._replace(default=4096),
        "layer_types": LAYER_TYPES,
        "sliding_window_pattern": PATTERN,
        "_sliding_window_pattern": PATTERN,
        "final_logit_softcapping": POSITIVE.or_null(),
        "attn_logit_softcapping": only(None),
        "use_bidirectional_attention": only(False, None),
    }
    parts = (GQA, GeGLU, RMSNorm, RoPE)
    places = ENDS | ATTENTION | DENSE | QK_NORM | norms(*NAMES, ours=ORDER)
    gain, placement, qk_norm, activation = "1+w", "sandwich", "first", GELU

    def slides(self, c: Config, i: int) -> bool:
        if (types := c["layer_types"]) is None:
            return bool((i + 1) % c["sliding_window_pattern"])
        if len(types) != c["num_hidden_layers"]:
            raise ValueError(f"layer_types lists {len(types)} layers")
        return bool(types[i] == "sliding_attention")

    def window(self, c: Config, i: int) -> int | None:
        return c["sliding_window"] - 1 if self.slides(c, i) else None

    def mixer(self, c: Config, i: int, norm: RMSNorm) -> GQA:
        scalar = c["query_pre_attn_scalar"]
        scale = None if scalar == c["head_dim"] else scalar**-0.5
        return dataclasses.replace(super().mixer(c, i, norm), scale=scale)

    def rope(self, c: Config, i: int) -> RoPE:
        """rope_parameters has an object for each kind of layer; older files have keys for the two bases instead."""
        local = self.slides(c, i)
        nested = c["rope_parameters"] or {}
        if unknown := sorted(set(nested) - {"full_attention", "sliding_attention"}):
            raise ValueError(f"rope_parameters has {unknown[0]}")
        own = nested.get("sliding_attention" if local else "full_attention")
        if not OBJECT.valid(own):
            raise ValueError(f"rope_parameters has {own!r} for a kind of layer")
        theta, scaling = (c["rope_local_base_freq"], None) if local else (c["rope_theta"], c["rope_scaling"])
        if own and theta is not None and own.get("rope_theta", theta) != theta:
            raise ValueError("the bases in rope_parameters are others than those beside it")
        part = {**c, "rope_parameters": own, "rope_theta": theta, "rope_scaling": scaling}
        return read_rope(part, base=1e4 if local else 1e6, kinds=("default", "linear"))

    def mlp(self, c: Config, i: int) -> GeGLU:
        return GeGLU(c["intermediate_size"])

    def ends(self, c: Config) -> dict[str, Any]:
        cap, scale = c["final_logit_softcapping"], float(c["hidden_size"] ** 0.5)
        return {"embed_norm": False, "softcap": cap, "embed_scale": scale}

    def write(self, model: Model, length: int) -> dict[str, Any]:
        found = super().write(model, length)
        found["hidden_activation"] = found.pop("hidden_act")
        return {**found, "final_logit_softcapping": model.softcap}

    def write_mixers(self, model: Model) -> dict[str, Any]:
        mixer = model.mixers[0]
        scalar = mixer.head_dim if mixer.scale is None else mixer.scale**-2
        kinds = {"full_attention": None, "sliding_attention": None} | {
            "full_attention" if m.window is None else "sliding_attention": m for m in model.mixers
        }
        local = kinds["sliding_attention"]
        return {
            **super().write_mixers(model),
            "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-9 * scalar else scalar,
            "sliding_window": 4096 if local is None else local.window + 1,
            "layer_types": ["full_attention" if m.window is None else "sliding_attention" for m in model.mixers],
            "rope_parameters": {kind: rope_of(m.positions) for kind, m in kinds.items() if m is not None},
        }
