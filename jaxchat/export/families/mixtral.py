"""Mixtral and Qwen3-MoE: experts in place of the feed-forward, chosen by a softmax without a bias."""

from typing import Any

from jaxchat.export.families.keys import POSITIVE, WHOLE, WINDOW, Config, Key, flag, only, read_rope
from jaxchat.export.families.llama import (
    ATTENTION,
    DENSE,
    ENDS,
    KEYS,
    LAYER,
    NAMES,
    NORMS,
    QK_NORM,
    SIZED,
    Llama,
    Mistral,
    Table,
)
from jaxchat.export.places import Place
from jaxchat.model import GQA, Model, MoE, RMSNorm, RoPE, SwiGLU

EXPERTS = "num_hidden_layers and the number of experts"
LIST = Key(lambda value: isinstance(value, list) and all(type(one) is int for one in value), "a list of layers")


def experts(block: str, names: dict[str, str]) -> Table:
    """The places of router and experts below `block`."""
    places: Table = {
        ("experts", x): Place(f"{LAYER}{block}.experts.{{}}.{name}.weight", keys=EXPERTS) for x, name in names.items()
    }
    return places | {("mlp", "router"): Place(f"{LAYER}{block}.gate.weight", keys=EXPERTS)}


class Mixtral(Mistral):
    """A window is one of all layers, as in Mistral."""

    architecture, model_type = "MixtralForCausalLM", "mixtral"
    keys = KEYS | {
        "num_key_value_heads": SIZED,
        "rms_norm_eps": POSITIVE._replace(default=1e-5),
        "sliding_window": WINDOW.or_null(),
        "num_local_experts": WHOLE,
        "num_experts_per_tok": WHOLE,
    }
    parts = (GQA, MoE, RMSNorm, RoPE)
    places = ENDS | ATTENTION | NORMS | experts("block_sparse_moe", {"gate": "w1", "out": "w2", "in": "w3"})

    def rope(self, c: Config, i: int) -> RoPE:
        return read_rope(c, base=1e6)

    def mlp(self, c: Config, i: int) -> MoE:
        sizes = (c["num_local_experts"], c["num_experts_per_tok"], c["intermediate_size"])
        return MoE(*sizes, router="softmax", selection_bias=False)

    def write_mlps(self, model: Model) -> dict[str, Any]:
        moe = model.layers[0].mlp
        sizes = {"num_local_experts": moe.experts, "num_experts_per_tok": moe.active}
        return {"intermediate_size": moe.hidden, **sizes}


class Qwen3MoE(Llama):
    """Qwen3 whose feed-forwards are experts, but for the layers of `mlp_only_layers` and `decoder_sparse_step`."""

    architecture, model_type = "Qwen3MoeForCausalLM", "qwen3_moe"
    keys = KEYS | {
        "num_key_value_heads": SIZED,
        "attention_bias": flag(False),
        "use_sliding_window": flag(False),
        "sliding_window": WINDOW.or_null()._replace(default=4096),
        "max_window_layers": Key(lambda value: True, "anything", None),  # The family does not read it.
        "num_experts": WHOLE.or_null(),
        "num_local_experts": WHOLE.or_null(),
        "num_experts_per_tok": WHOLE,
        "moe_intermediate_size": WHOLE,
        "norm_topk_prob": flag(False),
        "decoder_sparse_step": WHOLE._replace(default=1),
        "mlp_only_layers": LIST.or_null(),
        "shared_expert_intermediate_size": only(None),
    }
    parts = (GQA, MoE, SwiGLU, RMSNorm, RoPE)
    places = ENDS | ATTENTION | DENSE | QK_NORM | NORMS | experts("mlp", NAMES)
    qk_norm = "first"

    def window(self, c: Config, i: int) -> int | None:
        return c["sliding_window"] - 1 if c["use_sliding_window"] and c["sliding_window"] else None

    def mlp(self, c: Config, i: int) -> MoE | SwiGLU:
        both = {c["num_experts"], c["num_local_experts"]} - {None}
        if len(both) != 1:
            raise ValueError("num_experts, or num_local_experts, must be one number")
        if i in (c["mlp_only_layers"] or ()) or (i + 1) % c["decoder_sparse_step"]:
            return SwiGLU(c["intermediate_size"])
        sizes = (both.pop(), c["num_experts_per_tok"], c["moe_intermediate_size"])
        return MoE(*sizes, router="softmax", selection_bias=False, normalise=c["norm_topk_prob"])

    def write_mixers(self, model: Model) -> dict[str, Any]:
        window = model.mixers[0].window
        size = {"sliding_window": window and window + 1, "use_sliding_window": window is not None}
        return {**super().write_mixers(model), **size}

    def write_mlps(self, model: Model) -> dict[str, Any]:
        mlps = [layer.mlp for layer in model.layers]
        moe = next((mlp for mlp in mlps if isinstance(mlp, MoE)), MoE(2, 1, 1, normalise=False))
        dense = [i for i, mlp in enumerate(mlps) if isinstance(mlp, SwiGLU)]
        return {
            "intermediate_size": mlps[dense[0]].hidden if dense else 1,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.active,
            "moe_intermediate_size": moe.hidden,
            "norm_topk_prob": moe.normalise,
            "mlp_only_layers": dense,
        }
