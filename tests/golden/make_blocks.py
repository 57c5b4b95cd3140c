"""Make blocks.npz: attention and mixture-of-experts blocks of transformers with random weights.

Run `python tests/golden/make_blocks.py` with the extra `interop` installed. Needs no network and no checkpoint. Weights
and inputs are not stored: `tests/weights.py` makes them again from a seed and the name, and a checksum shows that they
are the same.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from weights import SEED, checksum, random_weight  # noqa: E402

ROWS, LENGTH, WIDTH = 2, 16, 32
FAR = 3000  # First position of the second row.
HEADS = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "max_position_embeddings": 4096,
    "attn_implementation": "eager",
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
ATTENTION = {
    "mla": {"q_lora_rank": 10, "rope_parameters": PLAIN},
    "mla_plain_queries": {"q_lora_rank": None, "rope_parameters": PLAIN},
    "mla_yarn": {"q_lora_rank": 10, "rope_parameters": YARN},
}
V3 = {
    "hidden_size": WIDTH,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
V2 = {**V3, "num_experts_per_tok": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5}
TOP2 = {"hidden_size": WIDTH, "num_experts_per_tok": 2}
EXPERTS = {
    "deepseek_v3": (v3.DeepseekV3MoE, v3.DeepseekV3Config(**V3)),
    "deepseek_v2": (v2.DeepseekV2Moe, v2.DeepseekV2Config(**V2)),
    "mixtral": (
        mixtral.MixtralSparseMoeBlock,
        mixtral.MixtralConfig(intermediate_size=12, num_local_experts=8, **TOP2),
    ),
    "qwen3_moe": (
        qwen3.Qwen3MoeSparseMoeBlock,
        qwen3.Qwen3MoeConfig(moe_intermediate_size=12, num_experts=8, norm_topk_prob=False, **TOP2),
    ),
}


def fill(block: Any, name: str) -> dict[str, np.ndarray]:
    """Sets every weight and buffer of a block, also norms and the selection bias, which a fresh one has at 1 and 0."""
    arrays = {}
    with torch.no_grad():
        for key, weight in (*block.named_parameters(), *block.named_buffers()):
            arrays[key] = random_weight(f"{name}/{key}", tuple(weight.shape))
            weight.copy_(torch.from_numpy(arrays[key]))
    return arrays


def results(name: str, x: torch.Tensor, y: torch.Tensor, block: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The output, the gradients of a random projection of it, and the checksum of what it was made from."""
    probe = random_weight(f"{name}/probe", tuple(y.shape))
    (y * torch.from_numpy(probe)).sum().backward()
    named = {key: weight.grad.numpy() for key, weight in block.named_parameters() if weight.grad is not None}
    kept = {f"{name}/gradients/{key}": g for key, g in named.items() if "gate.weight" in key or "kv_b" in key}
    total = checksum({**arrays, "x": x.detach().numpy(), "probe": probe})
    return {f"{name}/y": y.detach().numpy(), f"{name}/dx": x.grad.numpy(), f"{name}/checksum": total} | kept


def inputs(name: str) -> torch.Tensor:
    return torch.from_numpy(random_weight(f"{name}/x", (ROWS, LENGTH, WIDTH))).requires_grad_()


def attention(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    config = v3.DeepseekV3Config(**HEADS, **settings)
    block, x = v3.DeepseekV3Attention(config, 0), inputs(name)
    arrays = fill(block, name)
    positions = torch.arange(LENGTH)[None] + torch.tensor([[0], [FAR]])
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]
    y, _ = block(x, v3.DeepseekV3RotaryEmbedding(config)(x, positions), mask)
    return results(name, x, y, block, arrays)


def experts(name: str, kind: Any, config: Any) -> dict[str, Any]:
    config._experts_implementation = "eager"
    block, x = kind(config), inputs(name)
    arrays = fill(block, name)
    made = results(name, x, block(x), block, arrays)
    logits, gates, chosen = block.gate(x)
    counts = torch.bincount(chosen.reshape(-1), minlength=logits.shape[-1]).numpy()
    made |= {f"{name}/gates": gates.detach().numpy(), f"{name}/chosen": chosen.numpy(), f"{name}/counts": counts}
    if name == "mixtral":
        loss = [mixtral.load_balancing_loss_func((rows,), 8, 2) for rows in logits.reshape(ROWS, LENGTH, -1)]
        made[f"{name}/balance"] = torch.stack(loss).mean().detach().numpy()
    return made


def main() -> None:
    torch.manual_seed(0)
    arrays: dict[str, Any] = {}
    for name, settings in ATTENTION.items():
        arrays |= attention(name, settings)
    for name, (kind, config) in EXPERTS.items():
        arrays |= experts(name, kind, config)
    about = {"transformers": transformers.__version__, "torch": torch.__version__, "seed": SEED, "far": FAR}
    np.savez_compressed(HERE / "blocks.npz", about=json.dumps(about), **arrays)


if __name__ == "__main__":
    main()
