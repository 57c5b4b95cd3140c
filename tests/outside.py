"""Golden files and state dicts of other projects as jaxchat's configurations and parameter trees, for tests."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxchat.model import (
    GQA,
    Backout,
    Layer,
    Model,
    ReluSquared,
    ResidualScales,
    RMSNorm,
    RoPE,
    Smear,
    ValueEmbedding,
)

GOLDEN = Path(__file__).parent / "golden"
Array = np.ndarray


class Golden(NamedTuple):
    """A golden file: its configuration, its arrays, and the weights and gradients by the maker's names."""

    config: dict[str, Any]
    arrays: dict[str, Array]
    weights: dict[str, Array]
    gradients: dict[str, Array]


def read_arrays(name: str) -> dict[str, Array]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file}


def read(name: str) -> Golden:
    arrays = read_arrays(name)
    about = json.loads(str(arrays.pop("about")))

    def part(prefix: str) -> dict[str, Array]:
        return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}

    return Golden(about["config"], arrays, part("weights/"), part("gradients/"))


def head_model(c: dict[str, Any]) -> Model:
    """nanochat HEAD with the windows of the golden file; value embeddings on every second layer, the last included."""
    norm, last = RMSNorm(c["eps"]), c["depth"] - 1
    mlp = ReluSquared(4 * c["width"])
    mixers = tuple(
        GQA(
            c["heads"],
            c["kv_heads"],
            c["width"] // c["heads"],
            window=window,
            positions=RoPE(100_000.0),
            qk_norm=norm,
            qk_scale=1.2,
            value_embedding=ValueEmbedding() if i % 2 == last % 2 else None,
        )
        for i, window in enumerate(c["windows"])
    )
    return Model(
        vocab=c["vocab"],
        width=c["width"],
        depth=c["depth"],
        pattern=tuple(Layer(mixer, mlp, norm) for mixer in mixers),
        norm=norm,
        residual_scales=ResidualScales(),
        smear=Smear(),
        backout=Backout(),
        isolate_documents=False,
    )
