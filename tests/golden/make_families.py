"""Make families.npz: what transformers computes with a small model of random weights for each family of weights.

Run `python tests/golden/make_families.py` with the extra `interop` installed. Needs no network and no checkpoint.
Weights are not in the file: `random_weight` of tests/weights.py makes them again from (seed, name) under the names that
transformers writes to disk, from where it reads them here; shapes and a checksum are stored.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from weights import SEED, checksum, random_weight

VOCAB, SCALE, NEW, FAR = 64, 0.2, 12, 4089  # FAR: the position of the ninth token.
PLAIN = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=8192,
)
LATENT = PLAIN | dict(
    num_key_value_heads=4,
    kv_lora_rank=12,
    q_lora_rank=10,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    moe_intermediate_size=12,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
)
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
}
T = transformers
CONFIGS: dict[str, Any] = {
    "gpt2": T.GPT2Config(vocab_size=VOCAB, n_positions=40, n_embd=32, n_layer=2, n_head=4),
    "llama": T.LlamaConfig(**PLAIN, head_dim=16, attention_bias=True, mlp_bias=True),
    "llama3": T.LlamaConfig(**PLAIN, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama_linear": T.LlamaConfig(**PLAIN, rope_parameters=LINEAR),
    "llama_yarn": T.LlamaConfig(**PLAIN, rope_parameters=YARN),
    "mistral": T.MistralConfig(**PLAIN, sliding_window=5),
    "qwen2": T.Qwen2Config(**PLAIN, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": T.Qwen3Config(**PLAIN, head_dim=16),
    "olmo2": T.Olmo2Config(**PLAIN),
    "gemma3": T.Gemma3TextConfig(
        **PLAIN | {"num_hidden_layers": 3},
        head_dim=16,
        sliding_window=5,
        query_pre_attn_scalar=64,
        final_logit_softcapping=5.0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": LINEAR | {"rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "mixtral": T.MixtralConfig(**PLAIN, num_local_experts=4),
    "qwen3_moe": T.Qwen3MoeConfig(
        **PLAIN, num_experts=4, moe_intermediate_size=12, num_experts_per_tok=2, head_dim=16, mlp_only_layers=[0]
    ),
    "deepseek_v2": T.DeepseekV2Config(
        **LATENT | {"q_lora_rank": None},
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.5,
        rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek_v3": T.DeepseekV3Config(**LATENT, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
    "nanochat": T.NanoChatConfig(**PLAIN),
}
WITH_GRADIENTS = ("gpt2", "llama3", "gemma3")  # Their parameters have the names that they have on disk.


def made(name: str, place: Path) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
    """The model, its config.json and its weights."""
    config = CONFIGS[name]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, None, None
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    with safe_open(place / "model.safetensors", "numpy") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    weights = {key: random_weight(key, shape, scale=SCALE) for key, shape in shapes.items()}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager").eval()
    return model, json.loads((place / "config.json").read_text()), weights


def greedy(model: Any, ids: np.ndarray) -> tuple[list[int], float]:
    """The tokens that follow, and the least lead of one over the next likely."""
    found = model.generate(
        torch.from_numpy(ids)[None].long(),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(found.scores)[:, 0].topk(2).values
    return found.sequences[0, len(ids) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def family(name: str, ids: np.ndarray) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        model, config, weights = made(name, Path(place))
    far = FAR if config.get("n_positions") is None else 20
    positions = np.concatenate([np.arange(8), far + np.arange(8)])
    call = dict(position_ids=torch.from_numpy(positions)[None], attention_mask=torch.ones(1, 16), use_cache=False)
    tokens = torch.from_numpy(ids)[None].long()
    logits = model(tokens, **call).logits[0]
    arrays: dict[str, Any] = {f"{name}/logits": logits.detach().numpy(), f"{name}/positions": positions}
    arrays[f"{name}/greedy"], margin = greedy(model, ids[:8])
    if name in WITH_GRADIENTS:
        torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:]).backward()
        for key, weight in model.named_parameters():
            probe = torch.from_numpy(random_weight(f"probe/{key}", tuple(weight.shape)))
            made_of = (float((weight.grad * probe).sum()), float(weight.grad.norm() * probe.norm()))
            arrays[f"{name}/gradients/{key}"] = np.array(made_of, np.float32)
    shapes = {key: list(value.shape) for key, value in weights.items()}
    arrays[f"{name}/about"] = json.dumps([checksum(weights), shapes, config])
    print(f"{name}: {len(weights)} tensors, largest logit {logits.abs().max():.3g}, least lead {margin:.2g}")
    return arrays


if __name__ == "__main__":
    drawn = np.random.default_rng(SEED).integers(2, VOCAB, 16).astype(np.int32)
    found: dict[str, Any] = {"tokens": drawn}
    for one in CONFIGS:
        found |= family(one, drawn)
    found["versions"] = json.dumps({"transformers": transformers.__version__, "torch": torch.__version__})
    path = Path(__file__).parent / "families.npz"
    np.savez_compressed(path, **found)
    print(path.name, path.stat().st_size, "bytes")
