"""Make parts.npz: what transformers computes with parts that no importable family has, and its scaled frequencies.

Run `python tests/golden/make_parts.py` with the extra `interop` installed. Needs no network and no checkpoint. Weights
are not in the file: `random_weight` of tests/weights.py makes them again from (seed, name), and a checksum is stored.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
from transformers.models.t5.modeling_t5 import T5Attention

sys.path.insert(0, str(Path(__file__).parent.parent))
from weights import SEED, checksum, random_weight

VOCAB, LENGTH = 64, 16
COMMON = dict(vocab_size=VOCAB, pad_token_id=None, bos_token_id=0, eos_token_id=None, attn_implementation="eager")
GATED = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)

MODELS: dict[str, Any] = {
    "bloom": transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=36, n_layer=2, n_head=6, hidden_dropout=0.0, **COMMON)
    ),
    "mpt": transformers.MptForCausalLM(transformers.MptConfig(d_model=36, n_heads=6, n_layers=2, **COMMON)),
    "xglm": transformers.XGLMForCausalLM(
        transformers.XGLMConfig(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, **COMMON | {"pad_token_id": 1})
    ),
    "openai": transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH, **COMMON)
    ),
    "gemma2": transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
            sliding_window=5,
            **GATED,
            **COMMON,
        )
    ),
    "olmo2": transformers.Olmo2ForCausalLM(transformers.Olmo2Config(num_key_value_heads=2, **GATED, **COMMON)),
}
FREQUENCIES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
    "yarn_part": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
        "truncate": False,
        "partial_rotary_factor": 0.5,
    },
}


def logits(name: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
    model = MODELS[name].eval()
    weights = {key: random_weight(key, tuple(value.shape)) for key, value in model.named_parameters()}
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(torch.from_numpy(weights[key]))
        found = model(torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0]
    print(f"{name}: {len(weights)} weights, largest logit {found.abs().max():.3g}")
    shapes = {key: list(value.shape) for key, value in weights.items()}
    return {f"{name}/logits": found.numpy(), f"{name}/about": json.dumps([checksum(weights), shapes])}


def frequencies(name: str) -> np.ndarray:
    """The angles per position, and the factor of cosine and sine after them."""
    rope = {"rope_theta": 500_000.0, **FREQUENCIES[name]}
    config = transformers.LlamaConfig(head_dim=64, max_position_embeddings=131_072, rope_parameters=rope)
    found, amplitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device="cpu")
    return np.append(found.numpy(), amplitude)


def sinks() -> dict[str, np.ndarray]:
    """Causal attention of 4 heads and 2 kv heads, 7 tokens, with a sink per head; arrays are (heads, tokens, size)."""
    draw = lambda key, *shape: random_weight(key, shape)  # noqa: E731
    q, k, v = draw("q", 4, 7, 8), draw("k", 2, 7, 8), draw("v", 2, 7, 8)
    module = SimpleNamespace(num_key_value_groups=2, sinks=torch.from_numpy(draw("sinks", 4)), training=False)
    mask = torch.full((7, 7), -1e30).triu(1)[None, None]
    found, _ = eager_attention_forward(module, *(torch.from_numpy(x)[None] for x in (q, k, v)), mask, 8**-0.5)
    return {"sinks/output": found[0].numpy()}


if __name__ == "__main__":
    ids = np.random.default_rng(SEED).integers(2, VOCAB, LENGTH).astype(np.int32)
    arrays: dict[str, Any] = {"tokens": ids, **sinks()}
    for part in MODELS:
        arrays |= logits(part, ids)
    arrays |= {f"frequencies/{name}": frequencies(name) for name in FREQUENCIES}
    for buckets, longest in ((32, 128), (8, 20)):
        distance = torch.arange(longest + 40)
        bucket = T5Attention._relative_position_bucket(-distance, False, buckets, longest)
        arrays[f"buckets/{buckets}_{longest}"] = bucket.numpy().astype(np.int32)
    arrays["versions"] = json.dumps({"transformers": transformers.__version__, "torch": torch.__version__})
    place = Path(__file__).parent / "parts.npz"
    np.savez_compressed(place, **arrays)
    print(place.name, place.stat().st_size, "bytes")
