"""Small models of both families, parameters that use every part of them, and batches, for tests."""

from collections import Counter
from typing import Any

import jax
import numpy as np

from jaxchat.model import (
    GQA,
    MLA,
    Backout,
    Layer,
    Model,
    MoE,
    ReluSquared,
    ResidualScales,
    RMSNorm,
    RoPE,
    Smear,
    SwiGLU,
    Transformer,
    ValueEmbedding,
)


def model(*, pattern: Any, mlp: Any, **fields: Any) -> Model:
    """A model of layers with these mixers, which share a feed-forward."""
    return Model(pattern=tuple(Layer(mixer, mlp) for mixer in pattern), **fields)


def july2026(**changes: Any) -> Model:
    """Value embeddings, windows, smear, backout and residual scales; the pattern twice over."""
    plain = {"heads": 4, "kv_heads": 2, "head_dim": 4, "qk_scale": 1.2}
    pattern = (GQA(window=3, **plain), GQA(value_embedding=ValueEmbedding(gate_channels=4), **plain))
    fields: dict[str, Any] = {
        "vocab": 60,
        "width": 16,
        "depth": 4,
        "pattern": pattern,
        "mlp": ReluSquared(24),
        "residual_scales": ResidualScales(),
        "smear": Smear(channels=8),
        "backout": Backout(),
    }
    return model(**fields | changes)


def october2025(**changes: Any) -> Model:
    """The plain family, which lets documents see each other."""
    fields: dict[str, Any] = {
        "vocab": 60,
        "width": 16,
        "depth": 2,
        "pattern": (GQA(heads=4, kv_heads=4, head_dim=4, init="normal"),),
        "mlp": ReluSquared(24, init="normal", init_scale=1.0),
        "isolate_documents": False,
    }
    return model(**fields | changes)


def mixed(**changes: Any) -> Model:
    """One kv head, the narrowest window, a layer with neither rotation nor norm, SwiGLU, a tied head, no softcap."""
    pattern = (
        GQA(heads=4, kv_heads=1, head_dim=4, window=1, positions=RoPE(direction=1)),
        GQA(heads=2, kv_heads=2, head_dim=8, window=4, positions=None, qk_norm=None),
        GQA(heads=4, kv_heads=2, head_dim=4, window=None),
    )
    fields: dict[str, Any] = {
        "vocab": 64,
        "width": 16,
        "depth": 3,
        "pattern": pattern,
        "mlp": SwiGLU(24),
        "tied": True,
        "softcap": None,
    }
    return model(**fields | changes)


def latent(**changes: Any) -> Model:
    """Latent attention, and experts of which one layer's are chosen by a bias."""
    layers = (
        Layer(MLA(heads=4, head_dim=4, rope_dim=2, value_dim=6, kv_rank=8, norm=RMSNorm(gain="w")), MoE(4, 2, 12)),
        Layer(MLA(heads=2, head_dim=6, rope_dim=4, value_dim=4, kv_rank=6, q_rank=8), MoE(6, 2, 8, shared=8, groups=3)),
    )
    return Model(**{"vocab": 60, "width": 16, "depth": 2, "pattern": layers} | changes)


def parameters(config: Model, dtype: Any = np.float32, scale: float = 0.3, seed: int = 0) -> Any:
    """Random values for every parameter: the initial ones leave zeros that hide whole branches."""
    generator = np.random.default_rng(seed)
    draw = lambda leaf: (scale * generator.standard_normal(leaf.shape)).astype(dtype)  # noqa: E731
    return jax.tree.map(draw, Transformer(config).shapes())


def batch(rows: int, length: int, vocab: int, dtype: Any = np.float32, seed: int = 1) -> dict[str, np.ndarray]:
    """Rows of two or three documents; weights of 0, 1 and between, unevenly spread over the rows."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    starts = generator.random((rows, length)) < 2 / length
    weights = generator.random((rows, length)) * (generator.random((rows, length)) < np.linspace(0.3, 1, rows)[:, None])
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights.astype(dtype),
        "segments": np.cumsum(starts, axis=1).astype(np.int32),
    }


def assert_close(ours: Any, theirs: Any, tolerance: float, floor: float = 1e-30) -> None:
    """Every leaf within `tolerance` of the largest value of the leaf it should equal, or of `floor` if that is more."""
    for (path, mine), other in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        mine, other = np.asarray(mine), np.asarray(other)
        gap = np.abs(mine - other).max() / max(np.abs(other).max(), floor)
        assert gap <= tolerance, f"{jax.tree_util.keystr(path)} differs by {gap:.2e} of its largest value"


def dispatches(engine: Any) -> Counter[str]:
    """Counts an engine's dispatches from now on, their slot steps, and those that gave an unfinished sample a token."""
    counts, append = Counter[str](), engine.slots._append_all

    def counted(steps: Any) -> None:
        samples = engine.slots.active
        before = sum(len(sample.tokens) for sample in samples)
        append(steps)
        useful = sum(len(sample.tokens) for sample in samples) - before
        counts.update({"dispatches": 1, "slot steps": steps.token_B.size, "useful steps": useful})

    engine.slots._append_all = counted
    return counts
