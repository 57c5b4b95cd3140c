"""Llama (also SmolLM2 and TinyLlama) and the dense families that differ from it by some parts of a layer."""

import dataclasses
from typing import Any, ClassVar, Literal

from jaxchat.export.families.family import Family, stacked
from jaxchat.export.families.keys import (
    LAYER_TYPES,
    POSITIVE,
    ROPE,
    WHOLE,
    WINDOW,
    Config,
    Key,
    flag,
    only,
    read_rope,
    whole,
    write_rope,
)
from jaxchat.export.places import Place
from jaxchat.model import GQA, Layer, Model, RMSNorm, RoPE, SwiGLU
from jaxchat.model.norms import Gain

SIZES = "num_hidden_layers, hidden_size, num_attention_heads, num_key_value_heads and head_dim"
HIDDEN = "num_hidden_layers, hidden_size and intermediate_size"
LAYER = "model.layers.{}."


Table = dict[tuple[str, ...], Place]


def biased(places: Table) -> Table:
    """The places of matrices, and of their biases."""
    names = {path: place.name.removesuffix("weight") + "bias" for path, place in places.items()}
    return {**places, **{(part, f"{name}_bias"): Place(names[part, name], keys="biases") for part, name in names}}


ENDS: Table = {
    ("embed",): Place("model.embed_tokens.weight", keys="vocab_size and hidden_size"),
    ("head",): Place("lm_head.weight", keys="tie_word_embeddings, vocab_size and hidden_size"),
    ("final_norm", "gain"): Place("model.norm.weight", keys="hidden_size"),
}
ATTENTION = biased({("mixer", x): Place(f"{LAYER}self_attn.{x}_proj.weight", keys=SIZES) for x in "qkvo"})
NAMES = {"gate": "gate_proj", "in": "up_proj", "out": "down_proj"}
DENSE = biased({("mlp", x): Place(f"{LAYER}mlp.{name}.weight", keys=HIDDEN) for x, name in NAMES.items()})
QK_NORM: Table = {("mixer", f"{x}_norm", "gain"): Place(f"{LAYER}self_attn.{x}_norm.weight") for x in "qk"}


def norms(*names: str, ours: tuple[str, ...] = ("mixer_norm", "mlp_norm")) -> Table:
    """The places of a layer's norms."""
    return {(norm, "gain"): Place(f"{LAYER}{name}.weight", keys="hidden_size") for norm, name in zip(ours, names)}


NORMS = norms("input_layernorm", "post_attention_layernorm")
KEYS: dict[str, Key] = {
    "vocab_size": WHOLE,
    "hidden_size": WHOLE,
    "intermediate_size": WHOLE,
    "num_hidden_layers": whole(most=10_000),
    "num_attention_heads": WHOLE,
    "num_key_value_heads": WHOLE.or_null(),
    "head_dim": WHOLE.or_null(),
    "max_position_embeddings": whole(least=2),
    "rms_norm_eps": POSITIVE._replace(default=1e-6),
    **ROPE,
    "tie_word_embeddings": flag(False),
    "hidden_act": only("silu"),
    "attention_bias": only(False),
    **dict.fromkeys(("mlp_bias", "qkv_bias", "rope_interleaved", "use_sliding_window", "use_mrope"), only(False)),
    "is_encoder_decoder": only(False),
    **dict.fromkeys(("sliding_window", "quantization_config", "per_layer_config"), only(None)),
}
SIZED = WHOLE.or_null()._replace(default=...)  # A size that may be null, but for which transformers has a default.
SLIDING: dict[str, Key] = {
    "use_sliding_window": flag(False),
    "sliding_window": WINDOW.or_null()._replace(default=4096),
    "max_window_layers": whole(least=0)._replace(default=28),
    "layer_types": LAYER_TYPES,
}


class Llama(Family):
    """Llama. Subclasses set what differs as class attributes."""

    architecture, model_type = "LlamaForCausalLM", "llama"
    keys = KEYS | {"attention_bias": flag(False), "mlp_bias": flag(False)}
    parts: ClassVar[tuple[type, ...]] = (GQA, SwiGLU, RMSNorm, RoPE)
    places = ENDS | ATTENTION | DENSE | NORMS
    dropped = (r".*\.rotary_emb\.inv_freq",)
    gain: ClassVar[Gain] = "w"
    placement: ClassVar[str] = "before"
    qk_norm: ClassVar[Literal["none", "first", "last"]] = "none"  # Before the rotation or after it.
    whole_norm: ClassVar[bool] = False
    activation: ClassVar[str] = "silu"
    direction: ClassVar[int] = 1

    def read(self, c: Config) -> tuple[Model, int]:
        norm = RMSNorm(float(c["rms_norm_eps"]), self.gain)
        layers = tuple(
            Layer(self.mixer(c, i, norm), self.mlp(c, i), norm, self.placement) for i in range(c["num_hidden_layers"])
        )
        model = Model(
            vocab=c["vocab_size"],
            width=c["hidden_size"],
            depth=len(layers),
            **stacked(layers),
            norm=norm,
            tied=c["tie_word_embeddings"],
            **self.ends(c),
        )
        return model, c["max_position_embeddings"]

    def ends(self, c: Config) -> dict[str, Any]:
        """Fields of the model that concern embedding and logits."""
        return {"embed_norm": False, "softcap": None}

    def mixer(self, c: Config, i: int, norm: RMSNorm) -> Any:
        """The mixer of layer i."""
        heads, bias = c["num_attention_heads"], c["attention_bias"]
        return GQA(
            heads,
            c["num_key_value_heads"] or heads,
            c["head_dim"] or c["hidden_size"] // heads,
            window=self.window(c, i),
            positions=self.rope(c, i),
            qk_norm=None if self.qk_norm == "none" else norm,
            qk_norm_first=self.qk_norm == "first",
            qk_norm_whole=self.whole_norm,
            qkv_bias=bias,
            o_bias=bias,
            init="normal",
        )

    def rope(self, c: Config, i: int) -> RoPE:
        return read_rope(c, self.direction)

    def window(self, c: Config, i: int) -> int | None:
        return None

    def mlp(self, c: Config, i: int) -> Any:
        """The feed-forward of layer i."""
        return SwiGLU(c["intermediate_size"], bias=c["mlp_bias"])

    def write(self, model: Model, length: int) -> dict[str, Any]:
        return {
            "vocab_size": model.vocab,
            "hidden_size": model.width,
            "num_hidden_layers": model.depth,
            "max_position_embeddings": length,
            "rms_norm_eps": model.norm.eps,
            "tie_word_embeddings": model.tied,
            "hidden_act": self.activation,
            "attention_dropout": 0.0,
            **self.write_mixers(model),
            **self.write_mlps(model),
        }

    def write_mixers(self, model: Model) -> dict[str, Any]:
        mixer = model.mixers[0]
        return {
            "num_attention_heads": mixer.heads,
            "num_key_value_heads": mixer.kv_heads,
            "head_dim": mixer.head_dim,
            "rope_parameters": write_rope(mixer.positions),
            **self.allowed(attention_bias=mixer.o_bias),
        }

    def write_mlps(self, model: Model) -> dict[str, Any]:
        mlp = model.layers[0].mlp
        return {"intermediate_size": mlp.hidden, **self.allowed(mlp_bias=mlp.bias)}

    def allowed(self, **values: Any) -> dict[str, Any]:
        """The entries whose values are valid in the family."""
        return {name: value for name, value in values.items() if self.keys[name].valid(value)}


class Mistral(Llama):
    """All layers have the window."""

    architecture, model_type = "MistralForCausalLM", "mistral"
    keys = KEYS | {"num_key_value_heads": SIZED, "sliding_window": WINDOW.or_null()._replace(default=4096)}

    def window(self, c: Config, i: int) -> int | None:
        return c["sliding_window"] and c["sliding_window"] - 1

    def write_mixers(self, model: Model) -> dict[str, Any]:
        window = model.mixers[0].window
        return {**super().write_mixers(model), "sliding_window": window and window + 1}


class Sliding(Llama):
    """Some layers may have a window."""

    def window(self, c: Config, i: int) -> int | None:
        return windowed(c, i)

    def write_mixers(self, model: Model) -> dict[str, Any]:
        return {**super().write_mixers(model), **write_windows(model)}


class Qwen2(Sliding):
    """Queries, keys and values have biases; some layers may have a window."""

    architecture, model_type = "Qwen2ForCausalLM", "qwen2"
    keys = KEYS | SLIDING | {"num_key_value_heads": SIZED}

    def mixer(self, c: Config, i: int, norm: RMSNorm) -> Any:
        return dataclasses.replace(super().mixer(c, i, norm), qkv_bias=True)


class Qwen3(Sliding):
    """Queries and keys are normalised before the rotation; some layers may have a window."""

    architecture, model_type = "Qwen3ForCausalLM", "qwen3"
    keys = KEYS | SLIDING | {"num_key_value_heads": SIZED, "head_dim": WHOLE, "attention_bias": flag(False)}
    places = Llama.places | QK_NORM
    qk_norm = "first"


class OLMo2(Llama):
    """Norms after mixer and feed-forward, within the residual, and of all queries or keys at once."""

    architecture, model_type = "Olmo2ForCausalLM", "olmo2"
    keys = KEYS | {"rms_norm_eps": POSITIVE._replace(default=1e-5), "attention_bias": flag(False)}
    places = ENDS | ATTENTION | DENSE | QK_NORM | norms("post_attention_layernorm", "post_feedforward_layernorm")
    placement, qk_norm, whole_norm = "inside", "first", True


def windowed(c: Config, i: int) -> int | None:
    """The window of layer i in Qwen2 and Qwen3: by layer_types or, without them, from layer max_window_layers on."""
    types, size = c["layer_types"], c["sliding_window"] if c["use_sliding_window"] else None
    if types is not None and len(types) != c["num_hidden_layers"]:
        raise ValueError(f"layer_types lists {len(types)} layers")
    slides = i >= c["max_window_layers"] if types is None else types[i] == "sliding_attention"
    if slides and types is not None and size is None:
        raise ValueError("layer_types has sliding_attention without a sliding_window in use")
    return size - 1 if slides and size is not None else None


def write_windows(model: Model) -> dict[str, Any]:
    """The keys `SLIDING`, with the window of the first layer that has one."""
    window = next((mixer.window for mixer in model.mixers if mixer.window is not None), None)
    types = ["full_attention" if mixer.window is None else "sliding_attention" for mixer in model.mixers]
    if window is None:
        return {"use_sliding_window": False, "sliding_window": None, "layer_types": types}
    return {"use_sliding_window": True, "sliding_window": window + 1, "layer_types": types}
