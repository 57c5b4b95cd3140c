"""Make nanochat_v1_mha.npz and nanochat_v1_gqa.npz with transformers' NanoChatForCausalLM, the October 2025 nanochat.

Run `python tests/golden/make_nanochat_v1.py` with the extra `interop` installed. Needs no network and no checkpoint.
"""

import json
import platform
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import NanoChatConfig, NanoChatForCausalLM

VARIANTS = {
    "mha": dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4),
    "gqa": dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
}
ROWS, LENGTH, VOCAB, WIDTH = 2, 24, 96, 32
PROMPT, NEW_TOKENS = (5, 17, 60), 32

# Large enough that scores, norms and the softcap are all away from their linear range.
STANDARD_DEVIATION = {"embed_tokens": 0.7, "lm_head": 0.9, "q_proj": 0.5, "k_proj": 0.5, "default": 0.25}
GRID = 1 / 64  # Weights are whole multiples of it: exact in float32 and float64, and small on disk.


def config(variant: str) -> NanoChatConfig:
    return NanoChatConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        final_logit_softcapping=15.0,
        rms_norm_eps=1e-6,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,  # torch would mask the gradient of its embedding
        attn_implementation="eager",
        **VARIANTS[variant],
    )


def random_weights(model: NanoChatForCausalLM, seed: int) -> None:
    """Overwrite every weight, also those a fresh model would leave at zero."""
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = next((s for part, s in STANDARD_DEVIATION.items() if part in name), STANDARD_DEVIATION["default"])
            values = np.round(scale * generator.standard_normal(weight.shape) / GRID) * GRID
            weight.copy_(torch.from_numpy(values))


def forward_backward(model: NanoChatForCausalLM, tokens: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    """Logits, mean cross-entropy and the gradient of every weight; targets are given, the model shifts nothing."""
    model.zero_grad()
    logits = model(tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
    loss.backward()
    results = {f"gradients/{name}": weight.grad.numpy().copy() for name, weight in model.named_parameters()}
    return {"logits": logits.detach().numpy(), "loss": loss.detach().numpy(), **results}


def greedy(model: NanoChatForCausalLM) -> dict[str, np.ndarray]:
    """The prompt with its greedy continuation, and the smallest margin by which a token won."""
    prompt = torch.tensor([PROMPT])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best_two = torch.stack(out.logits).topk(2, dim=-1).values
    margin = (best_two[..., 0] - best_two[..., 1]).min()
    return {"generated": out.sequences[0].numpy().astype(np.int32), "generated_margin": margin.numpy()}


def make(variant: str, seed: int) -> None:
    torch.manual_seed(0)
    model = NanoChatForCausalLM(config(variant)).eval()
    random_weights(model, seed)
    generator = np.random.default_rng(seed + 1000)
    ids = generator.integers(0, VOCAB, (ROWS, LENGTH + 1))
    tokens, targets = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())

    arrays = forward_backward(model, tokens, targets) | greedy(model)
    arrays |= {f"weights/{name}": weight.detach().numpy().copy() for name, weight in model.named_parameters()}
    exact = forward_backward(model.double(), tokens, targets)
    error = max(np.abs(arrays[name] - exact[name]).max() / max(1.0, np.abs(exact[name]).max()) for name in exact)
    about = {
        "config": config(variant).to_dict(),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__},
        "machine": platform.machine(),
        "seed": seed,
        "largest_difference_from_a_float64_run": float(error),
    }
    arrays |= {"tokens": ids[:, :-1].astype(np.int32), "targets": ids[:, 1:].astype(np.int32)}
    path = Path(__file__).parent / f"nanochat_v1_{variant}.npz"
    np.savez_compressed(path, about=json.dumps(about, default=str), **arrays)
    print(
        path.name, path.stat().st_size, "bytes, loss", arrays["loss"], "largest logit", np.abs(arrays["logits"]).max()
    )
    print("  greedy margin", arrays["generated_margin"], "float32 against float64", error)
    print("  greedy", arrays["generated"].tolist())


if __name__ == "__main__":
    for seed, variant in enumerate(VARIANTS):
        make(variant, seed)
