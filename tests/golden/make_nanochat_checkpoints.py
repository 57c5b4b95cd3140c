"""Make nanochat_checkpoints.npz: logits of nanochat's own models of October 2025 and July 2026 with random weights.

Run `python tests/golden/make_nanochat_checkpoints.py OCTOBER JULY` with checkouts of karpathy/nanochat at 3a5e0bc and
92d63d4, and torch installed. nanochat is imported, never copied. Everything is float32: October's casts to bfloat16 are
taken out. Weights are made again from their names (tests/weights.py); shapes and a checksum are stored.
"""

import dataclasses
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

os.environ["NANOCHAT_DTYPE"], os.environ["TORCHDYNAMO_DISABLE"] = "float32", "1"
import torch  # noqa: E402

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from weights import SEED, checksum, nanochat_weight  # noqa: E402

VOCAB, TOKENS = 700, 300  # More than the window of July's first layers.
SIZES = dict(vocab_size=VOCAB, n_layer=5, n_head=4, n_kv_head=2, n_embd=32)
CONFIGS: dict[str, dict[str, Any]] = {
    "october2025": SIZES | {"sequence_len": 320},
    "july2026": SIZES | {"sequence_len": 320, "window_pattern": "SSSL"},
}
AT = np.concatenate([np.arange(8), TOKENS - 8 + np.arange(8)])
IDS = np.concatenate([np.arange(60), VOCAB - 4 + np.arange(4)])


def gpt(checkout: str) -> Any:
    """nanochat's module of the model in a checkout, without bfloat16."""
    for name in [name for name in sys.modules if name.split(".")[0] == "nanochat"]:
        del sys.modules[name]
    sys.path.insert(0, checkout)
    import nanochat.common  # noqa: F401

    module = types.ModuleType("nanochat.gpt")
    sys.modules[module.__name__] = module
    source = Path(checkout, "nanochat/gpt.py").read_text()
    source = source.replace(".bfloat16()", "").replace("torch.bfloat16", "torch.float32")
    exec(compile(source, "gpt.py", "exec"), vars(module))
    sys.path.remove(checkout)
    return module


def main() -> None:
    ids = np.random.default_rng(SEED).integers(0, VOCAB, TOKENS)
    found: dict[str, Any] = {"tokens": ids.astype(np.int32), "positions": AT, "ids": IDS}
    for (name, config), checkout in zip(CONFIGS.items(), sys.argv[1:], strict=True):
        module = gpt(checkout)
        model = module.GPT(module.GPTConfig(**config))
        model.init_weights()
        model.float()
        weights = {key: nanochat_weight(key, tuple(value.shape)) for key, value in model.state_dict().items()}
        model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None])[0].numpy()
        shapes = {key: list(value.shape) for key, value in weights.items()}
        meta = {"step": 10, "model_config": dataclasses.asdict(model.config)}
        found[f"{name}/about"] = json.dumps([checksum(weights), shapes, meta])
        found[f"{name}/logits"] = logits[AT][:, IDS]
        print(f"{name}: {len(weights)} tensors, logits {logits.shape} up to {np.abs(logits).max():.3g}")
    found["versions"] = json.dumps({"torch": torch.__version__, "nanochat": ["3a5e0bc", "92d63d4"]})
    path = HERE / "nanochat_checkpoints.npz"
    np.savez_compressed(path, **found)
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
