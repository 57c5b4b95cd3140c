"""GPT-2: learned positions, LayerNorm, GELU, biases; queries, keys and values in one matrix (inputs, outputs)."""

from typing import Any, ClassVar

from jaxchat.export.families.family import Family, stacked
from jaxchat.export.families.keys import POSITIVE, WHOLE, Config, flag, only, whole
from jaxchat.export.places import Place, Places
from jaxchat.model import GELU, GQA, Layer, LayerNorm, Learned, Model

LAYER = "transformer.h.{}."
ACTIVATIONS = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu": False}  # Whether they use a tanh.
WIDTH = "n_layer, n_embd and n_head"
ATTENTION: Places = {
    ("mixer", f"{x}{bias}"): Place(f"{LAYER}attn.{name}.{kind}", False, WIDTH)
    for bias, kind in (("", "weight"), ("_bias", "bias"))
    for x, name in (("q", "c_attn"), ("k", "c_attn"), ("v", "c_attn"), ("o", "c_proj"))
}
DENSE: Places = {
    ("mlp", f"{x}{bias}"): Place(f"{LAYER}mlp.{name}.{kind}", False, "n_layer, n_embd and n_inner")
    for bias, kind in (("", "weight"), ("_bias", "bias"))
    for x, name in (("in", "c_fc"), ("out", "c_proj"))
}
NORMS: Places = {
    (norm, ours): Place(f"{name}.{kind}", keys="n_embd")
    for norm, name in (("mixer_norm", f"{LAYER}ln_1"), ("mlp_norm", f"{LAYER}ln_2"), ("final_norm", "transformer.ln_f"))
    for ours, kind in (("gain", "weight"), ("bias", "bias"))
}


class GPT2(Family):
    architecture, model_type = "GPT2LMHeadModel", "gpt2"
    parts = (GQA, GELU, LayerNorm, Learned)
    keys: ClassVar = {
        "vocab_size": WHOLE,
        "n_positions": whole(least=2),
        "n_embd": WHOLE,
        "n_layer": whole(most=10_000),
        "n_head": WHOLE,
        "n_inner": WHOLE.or_null(),
        "n_ctx": WHOLE.or_null(),
        "activation_function": only(*ACTIVATIONS),
        "layer_norm_epsilon": POSITIVE._replace(default=1e-5),
        "tie_word_embeddings": flag(True),
        "scale_attn_weights": only(True),
        **dict.fromkeys(
            ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention", "is_encoder_decoder"),
            only(False),
        ),
        **dict.fromkeys(("quantization_config", "per_layer_config"), only(None)),
    }
    places: ClassVar = {
        ("embed",): Place("transformer.wte.weight", keys="vocab_size and n_embd"),
        ("head",): Place("lm_head.weight", keys="tie_word_embeddings, vocab_size and n_embd"),
        ("positions_0", "table"): Place("transformer.wpe.weight", keys="n_positions and n_embd"),
        **ATTENTION,
        **DENSE,
        **NORMS,
    }
    dropped = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)

    def read(self, c: Config) -> tuple[Model, int]:
        heads, width, length, norm = c["n_head"], c["n_embd"], c["n_positions"], LayerNorm(c["layer_norm_epsilon"])
        if width % heads or c["n_ctx"] not in (None, length):
            raise ValueError("n_embd must be a multiple of n_head, and n_ctx, if there is one, equal n_positions")
        positions = Learned(length)
        mixer = GQA(heads, heads, width // heads, positions=positions, qk_norm=None, qkv_bias=True, o_bias=True)
        mlp = GELU(c["n_inner"] or 4 * width, bias=True, tanh=ACTIVATIONS[c["activation_function"]])
        model = Model(
            vocab=c["vocab_size"],
            width=width,
            depth=c["n_layer"],
            **stacked((Layer(mixer, mlp, norm),) * c["n_layer"]),
            norm=norm,
            embed_norm=False,
            tied=c["tie_word_embeddings"],
            softcap=None,
        )
        return model, length

    def write(self, model: Model, length: int) -> dict[str, Any]:
        layer = model.layers[0]
        return {
            "vocab_size": model.vocab,
            "n_positions": layer.mixer.positions.length,
            "n_embd": model.width,
            "n_layer": model.depth,
            "n_head": layer.mixer.heads,
            "n_inner": layer.mlp.hidden,
            "activation_function": "gelu_new" if layer.mlp.tanh else "gelu",
            "layer_norm_epsilon": layer.norm.eps,
            "tie_word_embeddings": model.tied,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
