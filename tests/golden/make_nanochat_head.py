"""Make nanochat_head.npz with nanochat's own classes, and check tests/reference.py against them.

Run `python tests/golden/make_nanochat_head.py CHECKOUT` with a checkout of karpathy/nanochat at 92d63d4 and torch
installed. nanochat is imported, never copied. Everything runs in float64: nanochat's casts to float32 are widened.
"""

import ast
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

os.environ["TORCHDYNAMO_DISABLE"] = (
    "1"  # The optimizer's steps are compiled functions; plain ones give the same numbers.
)
os.environ["NANOCHAT_DTYPE"] = "float32"
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), *sys.argv[1:2]]
import reference  # noqa: E402

DEPTH, WIDTH, HEADS, KV_HEADS, VOCAB, ROWS, LENGTH = 4, 32, 4, 2, 64, 2, 24
WINDOWS = (5, 5, 3, None)
STANDARD_DEVIATION = {"wte": 0.7, "value_embeds": 0.7, "lm_head": 0.9, "c_q": 0.5, "c_k": 0.5, "gate": 0.6}
SCALARS = {"resid_lambdas": 1.1, "x0_lambdas": 0.3, "smear_lambda": 0.8, "backout_lambda": 0.35}
GRID = 1 / 64
EPS = 2.0**-23


def widen() -> None:
    """Make nanochat compute in float64, with the norm's epsilon of its float32 runs."""
    import nanochat.gpt

    rms_norm = torch.nn.functional.rms_norm
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    torch.nn.functional.rms_norm = lambda x, shape: rms_norm(x, shape, eps=EPS)
    nanochat.gpt.COMPUTE_DTYPE = torch.float64


def build(seed: int) -> torch.nn.Module:
    """A small HEAD model, every weight random on a grid; windows are set by hand, for nanochat's smallest is 128."""
    from nanochat.gpt import GPT, GPTConfig

    model = GPT(GPTConfig(LENGTH, VOCAB, DEPTH, HEADS, KV_HEADS, WIDTH))
    model.init_weights()
    size = WIDTH // HEADS
    angles = torch.outer(torch.arange(LENGTH), 100_000.0 ** -(torch.arange(0, size, 2) / size))
    model.cos, model.sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    model.window_sizes = [(LENGTH if window is None else window, 0) for window in WINDOWS]
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = generator.standard_normal(tuple(weight.shape))
            scale = next((s for part, s in STANDARD_DEVIATION.items() if part in name), 0.25)
            values = SCALARS[name] + 0.1 * values if name in SCALARS else scale * values
            weight.copy_(torch.from_numpy(np.round(values / GRID) * GRID))
    return model.double()


def gap(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check_forward(model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    """Logits, loss and gradients by nanochat; prints how far the reference forward and cross-entropy are."""
    weights = {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}
    logits = model(tokens).detach().numpy()
    config = reference.HeadConfig(HEADS, KV_HEADS, WINDOWS, eps=EPS)
    print("forward:", gap(reference.head_forward(weights, tokens.numpy(), config), logits))
    inputs = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), inputs.append(args[0]))[1])
    loss = model(tokens, targets)
    loss.backward()
    hook.remove()
    gradients = {name: weight.grad.numpy().copy() for name, weight in model.named_parameters()}
    flat = tokens.numel()
    hidden = inputs[0].detach().numpy().reshape(flat, WIDTH)
    ours = reference.cross_entropy(hidden, weights["lm_head.weight"].T, targets.numpy().ravel(), np.ones(flat), 15.0)
    print("loss:", gap(np.array(ours.total / flat), loss.detach().numpy()))
    print("loss, gradient of the head:", gap(ours.head_MV.T / flat, gradients["lm_head.weight"]))
    print("loss, gradient of the hidden:", gap(ours.hidden_NM.reshape(inputs[0].shape) / flat, inputs[0].grad.numpy()))
    arrays = {"logits": logits, "loss": loss.detach().numpy()}
    arrays |= {f"gradients/{name}": gradient for name, gradient in gradients.items()}
    return arrays | {f"weights/{name}": weight for name, weight in weights.items()}


def check_attention() -> None:
    """Every mask at once (window, segments, padding, grouped heads) against torch with an explicit boolean mask."""
    generator = np.random.default_rng(3)
    length, window = 16, 4
    q, k, v = (generator.standard_normal((2, length, heads, 6)) for heads in (4, 2, 2))
    segments = np.sort(generator.integers(0, 3, (2, length)), axis=1)
    positions = np.arange(length)[None] - np.array([[3], [0]])
    positions[positions < 0] = -1
    ours = reference.attention(
        q,
        k,
        v,
        q_positions_BT=positions,
        k_positions_BS=positions,
        q_segments_BT=segments,
        k_segments_BS=segments,
        window=window,
    )
    ahead = positions[:, :, None] - positions[:, None]
    mask = (ahead >= 0) & (ahead <= window) & (segments[:, :, None] == segments[:, None]) & (positions[:, None] >= 0)
    heads_first = [torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=torch.from_numpy(mask)[:, None], enable_gqa=True
    )
    valid = positions >= 0
    print("attention, every mask:", gap(ours[valid], theirs.transpose(1, 2).numpy()[valid]))


def check_optimizer(model: torch.nn.Module) -> None:
    """Three steps of nanochat's MuonAdamW with random gradients, changing schedule and large decay; prints the gap."""
    scale = 0.7
    optimizer = model.setup_optimizer(0.008 * scale, 0.3 * scale, 0.02 * scale, 1.5, 0.5 * scale)
    for name, value in vars(optimizer).items():
        if isinstance(value, torch.Tensor):
            setattr(optimizer, name, value.double())
    values = {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}
    states = {}
    generator = np.random.default_rng(7)
    for step in range(3):
        rate, momentum, decay = 0.3 + 0.2 * step, 0.85 + 0.03 * step, 1.5 - 0.4 * step
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = momentum, decay
        for name, weight in model.named_parameters():
            gradient = generator.standard_normal(tuple(weight.shape)) * 0.01
            weight.grad = torch.from_numpy(gradient)
            if name.startswith("transformer.h."):
                state = states.get(name) or reference.muon_init(values[name])
                values[name], states[name] = reference.muon_step(
                    values[name], gradient, state, rate=0.02 * scale * rate, momentum=momentum, decay=decay
                )
            else:
                group = next(g for part, g in reference.GROUPS.items() if part in name)
                base = group.rate * (scale if group.batch_scaled else 1)
                base *= (WIDTH / 768) ** -0.5 if group.width_scaled else 1
                state = states.get(name) or reference.adamw_init(values[name])
                values[name], states[name] = reference.adamw_step(
                    values[name], gradient, state, rate=base * rate, betas=group.betas, decay=group.decay
                )
        optimizer.step()
        gaps = {name: gap(values[name], weight.detach().numpy()) for name, weight in model.named_parameters()}
        worst = max(gaps, key=gaps.get)
        print(f"optimizer, step {step}: {gaps[worst]} ({worst})")


def check_dial(checkout: Path) -> None:
    """Sizes by nanochat's classes on the meta device; schedules by its own functions, lifted out of the script."""
    from nanochat.gpt import GPT, GPTConfig

    for row in reference.SIZES:
        with torch.device("meta"):
            model = GPT(GPTConfig(2048, 32_768, row.depth, row.heads, row.heads, row.width))
        counts = model.num_scaling_params()
        theirs = row._replace(
            parameters=counts["total"],
            scaling_parameters=counts["transformer_matrices"] + counts["lm_head"],
            flops_per_token=model.estimate_flops(),
        )
        print("size:", theirs == row == reference.size(row.depth), theirs)
    for row in reference.HORIZONS:
        ours = reference.horizon(row.depth, row.ratio)
        print("horizon:", ours[:4] == row[:4] and np.allclose(ours[4:], row[4:], rtol=1e-4), ours)
    tree = ast.parse((checkout / "scripts/base_train.py").read_text())
    wanted = ("get_lr_multiplier", "get_muon_momentum", "get_weight_decay")
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    for steps in (30, 100, 600, 2_000):
        args = SimpleNamespace(warmup_steps=40, warmdown_ratio=0.65, final_lr_frac=0.05)
        scope = {"args": args, "num_iterations": steps, "weight_decay_scaled": 1.0, "math": math}
        exec(compile(tree, "base_train.py", "exec"), scope)
        ours = (reference.learning_rate_factor, reference.muon_momentum, reference.muon_decay_factor)
        worst = max(
            abs(scope[name](step) - function(step, steps))
            for name, function in zip(wanted, ours, strict=True)
            for step in range(steps)
        )
        print(f"schedules over {steps} steps: {worst}")


def main() -> None:
    checkout = Path(sys.argv[1])
    widen()
    model = build(seed=0)
    ids = np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH + 1))
    tokens, targets = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
    arrays = check_forward(model, tokens, targets)
    about = {
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "nanochat": "92d63d4"},
        "config": dict(depth=DEPTH, width=WIDTH, heads=HEADS, kv_heads=KV_HEADS, vocab=VOCAB, windows=WINDOWS, eps=EPS),
    }
    arrays = {name: array.astype(np.float32) if array.ndim else array for name, array in arrays.items()}
    arrays |= {"tokens": ids[:, :-1].astype(np.int32), "targets": ids[:, 1:].astype(np.int32)}
    np.savez_compressed(HERE / "nanochat_head.npz", about=json.dumps(about), **arrays)
    print("nanochat_head.npz", (HERE / "nanochat_head.npz").stat().st_size, "bytes, loss", arrays["loss"])
    check_attention()
    check_optimizer(model)
    check_dial(checkout)


if __name__ == "__main__":
    main()
