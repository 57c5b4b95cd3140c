"""DeepSeek-V2 and V3: latent attention, and experts of which some are shared, after a few dense layers.

Rotary channels are stored in neighbouring pairs and stay so here (`RoPE.interleaved`). The norms of latents have their
own eps. Layers for predicting several tokens are left out, as transformers leaves them out.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from jaxchat.export.families.keys import POSITIVE, WHOLE, Config, flag, only, read_rope, whole, write_rope
from jaxchat.export.families.llama import DENSE, ENDS, KEYS, LAYER, NAMES, NORMS, SIZES, Llama
from jaxchat.export.families.mixtral import experts
from jaxchat.export.places import Place
from jaxchat.model import MLA, Model, MoE, RMSNorm, RoPE, SwiGLU

LATENT = RMSNorm(1e-6, "w")
HEADS = "num_attention_heads, kv_lora_rank, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim"
DOWN, UP = (f"{LAYER}self_attn.{name}.weight" for name in ("kv_a_proj_with_mqa", "kv_b_proj"))
ATTENTION = {
    ("mixer", "kv_down"): Place(DOWN, keys=HEADS),
    ("mixer", "k_rope"): Place(DOWN, keys=HEADS),
    ("mixer", "k_up"): Place(UP, keys=HEADS, joined="heads"),
    ("mixer", "v_up"): Place(UP, keys=HEADS, joined="heads"),
    ("mixer", "kv_norm", "gain"): Place(f"{LAYER}self_attn.kv_a_layernorm.weight", keys=HEADS),
    ("mixer", "q"): Place(f"{LAYER}self_attn.q_proj.weight", keys=HEADS),
    ("mixer", "q_down"): Place(f"{LAYER}self_attn.q_a_proj.weight", keys=HEADS),
    ("mixer", "q_norm", "gain"): Place(f"{LAYER}self_attn.q_a_layernorm.weight", keys=HEADS),
    ("mixer", "q_up"): Place(f"{LAYER}self_attn.q_b_proj.weight", keys=HEADS),
    ("mixer", "o"): Place(f"{LAYER}self_attn.o_proj.weight", keys=SIZES),
}
SHARED = {("mlp", f"shared_{x}"): Place(f"{LAYER}mlp.shared_experts.{name}.weight") for x, name in NAMES.items()}
GROUPS = WHOLE.or_null()


class DeepSeekV3(Llama):
    """A sigmoid router with a bias in the selection; groups are ranked by their two best experts."""

    architecture, model_type = "DeepseekV3ForCausalLM", "deepseek_v3"
    keys = KEYS | {
        "head_dim": WHOLE.or_null(),
        "kv_lora_rank": WHOLE,
        "q_lora_rank": WHOLE.or_null()._replace(default=...),
        "qk_nope_head_dim": WHOLE,
        "qk_rope_head_dim": WHOLE,
        "qk_head_dim": WHOLE.or_null(),
        "v_head_dim": WHOLE,
        "n_routed_experts": WHOLE,
        "n_shared_experts": WHOLE,
        "num_experts_per_tok": WHOLE,
        "moe_intermediate_size": WHOLE,
        "n_group": GROUPS,
        "topk_group": GROUPS,
        "norm_topk_prob": flag(True),
        "routed_scaling_factor": POSITIVE._replace(default=2.5),
        "first_k_dense_replace": whole(least=0),
        "moe_layer_freq": only(1),
        "topk_method": only("noaux_tc"),
        "scoring_func": only("sigmoid"),
        "rope_interleave": flag(True),
    }
    parts = (MLA, MoE, SwiGLU, RMSNorm, RoPE)
    places = (
        ENDS
        | ATTENTION
        | DENSE
        | NORMS
        | SHARED
        | experts("mlp", NAMES)
        | {("mlp", "selection_bias"): Place(f"{LAYER}mlp.gate.e_score_correction_bias")}
    )
    router: ClassVar[Literal["sigmoid", "softmax"]] = "sigmoid"
    best: ClassVar[int] = 2  # A group is ranked by so many of its experts.

    def mixer(self, c: Config, i: int, norm: RMSNorm) -> MLA:
        heads, rotated, plain = c["num_attention_heads"], c["qk_rope_head_dim"], c["qk_nope_head_dim"]
        wanted = {"num_key_value_heads": heads, "head_dim": rotated, "qk_head_dim": rotated + plain}
        for name, value in wanted.items():
            if c[name] not in (None, value):
                raise ValueError(f"{name} must be {value} here, or null")
        rope = dataclasses.replace(
            read_rope(c, kinds=("default", "linear", "yarn"), scores=True), interleaved=c["rope_interleave"]
        )
        ranks = (c["kv_lora_rank"], c["q_lora_rank"])
        return MLA(heads, plain, rotated, c["v_head_dim"], *ranks, positions=rope, norm=LATENT)

    def mlp(self, c: Config, i: int) -> MoE | SwiGLU:
        if i < c["first_k_dense_replace"]:
            return SwiGLU(c["intermediate_size"])
        groups, hidden = self.groups(c), c["moe_intermediate_size"]
        return MoE(
            c["n_routed_experts"],
            c["num_experts_per_tok"],
            hidden,
            shared=c["n_shared_experts"] * hidden,
            router=self.router,
            normalise=c["norm_topk_prob"],
            scale=c["routed_scaling_factor"],
            groups=groups,
            top_groups=(c["topk_group"] or 0) if groups > 1 else 1,
            group_best=self.best if groups > 1 else 2,
            selection_bias=self.router == "sigmoid",
        )

    def groups(self, c: Config) -> int:
        return c["n_group"] or 1

    def write_mixers(self, model: Model) -> dict[str, Any]:
        m = model.mixers[0]
        return {
            "num_attention_heads": m.heads,
            "num_key_value_heads": m.heads,
            "qk_rope_head_dim": m.rope_dim,
            "qk_nope_head_dim": m.head_dim,
            "v_head_dim": m.value_dim,
            "kv_lora_rank": m.kv_rank,
            "q_lora_rank": m.q_rank,
            "rope_parameters": write_rope(m.positions),
            **self.allowed(rope_interleave=m.positions.interleaved),
        }

    def write_mlps(self, model: Model) -> dict[str, Any]:
        """The entries of config.json. For a model without experts they describe experts that no layer uses."""
        mlps = [layer.mlp for layer in model.layers]
        dense = [mlp for mlp in mlps if isinstance(mlp, SwiGLU)]
        moe = next((mlp for mlp in mlps if isinstance(mlp, MoE)), MoE(2, 1, 1, shared=1, normalise=False))
        return {
            "intermediate_size": dense[0].hidden if dense else 1,
            "first_k_dense_replace": len(dense),
            "n_routed_experts": moe.experts,
            "n_shared_experts": max(moe.shared // moe.hidden, 1),
            "num_experts_per_tok": moe.active,
            "moe_intermediate_size": moe.hidden,
            "n_group": moe.groups,
            "topk_group": moe.top_groups,
            "routed_scaling_factor": moe.scale,
            **self.allowed(norm_topk_prob=moe.normalise),
        }


class DeepSeekV2(DeepSeekV3):
    """A softmax router; groups, where there are any, are ranked by their best expert, and gates are not normalised."""

    architecture, model_type = "DeepseekV2ForCausalLM", "deepseek_v2"
    keys = DeepSeekV3.keys | {
        "norm_topk_prob": only(False),
        "routed_scaling_factor": POSITIVE._replace(default=1.0),
        "topk_method": only("greedy", "group_limited_greedy"),
        "scoring_func": only("softmax"),
        "rope_interleave": only(True),
    }
    router, best = "softmax", 1

    def groups(self, c: Config) -> int:
        return (c["n_group"] or 1) if c["topk_method"] == "group_limited_greedy" else 1

    def write_mlps(self, model: Model) -> dict[str, Any]:
        found = super().write_mlps(model)
        return {**found, "topk_method": "group_limited_greedy" if found["n_group"] > 1 else "greedy"}
