"""Golden files and state dicts of other projects as jaxchat's configurations and parameter trees, for tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxchat.model import (
    GQA,
    Backout,
    Model,
    ReluSquared,
    ResidualScales,
    RMSNorm,
    RoPE,
    Smear,
    Transformer,
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


def october_model(c: dict[str, Any]) -> Model:
    """The October 2025 family as transformers configures it."""
    head_dim = c["hidden_size"] // c["num_attention_heads"]
    norm, rope = RMSNorm(c["rms_norm_eps"]), RoPE(c["rope_parameters"]["rope_theta"])
    mixer = GQA(c["num_attention_heads"], c["num_key_value_heads"], head_dim, rope=rope, qk_norm=norm)
    return Model(
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        pattern=(mixer,),
        mlp=ReluSquared(c["intermediate_size"]),
        norm=norm,
        softcap=c["final_logit_softcapping"],
    )


def head_model(c: dict[str, Any]) -> Model:
    """nanochat HEAD with the windows of the golden file; value embeddings on every second layer, the last included."""
    norm, last = RMSNorm(c["eps"]), c["depth"] - 1
    pattern = tuple(
        GQA(
            c["heads"],
            c["kv_heads"],
            c["width"] // c["heads"],
            window=window,
            rope=RoPE(100_000.0),
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
        pattern=pattern,
        mlp=ReluSquared(4 * c["width"]),
        norm=norm,
        residual_scales=ResidualScales(),
        smear=Smear(),
        backout=Backout(),
        isolate_documents=False,
    )


# Where each of our parameters is found in a state dict: its name there, and how its matrix is laid out here.
Place = tuple[str, Callable[[Array, GQA], Array]]


def _heads_out(w_OI: Array, mixer: GQA) -> Array:
    return w_OI.T.reshape(w_OI.shape[1], -1, mixer.head_dim)


def _heads_in(w_OI: Array, mixer: GQA) -> Array:
    return w_OI.T.reshape(-1, mixer.head_dim, w_OI.shape[0])


def _transposed(w_OI: Array, mixer: GQA) -> Array:
    return w_OI.T


def _by_heads(w_VM: Array, mixer: GQA) -> Array:
    return w_VM.reshape(w_VM.shape[0], -1, mixer.head_dim)


OCTOBER_LAYER: dict[tuple[str, str], Place] = {
    ("mixer", "q"): ("model.layers.{}.self_attn.q_proj.weight", _heads_out),
    ("mixer", "k"): ("model.layers.{}.self_attn.k_proj.weight", _heads_out),
    ("mixer", "v"): ("model.layers.{}.self_attn.v_proj.weight", _heads_out),
    ("mixer", "o"): ("model.layers.{}.self_attn.o_proj.weight", _heads_in),
    ("mlp", "in"): ("model.layers.{}.mlp.fc1.weight", _transposed),
    ("mlp", "out"): ("model.layers.{}.mlp.fc2.weight", _transposed),
}
HEAD_LAYER: dict[tuple[str, str], Place] = {
    ("mixer", "q"): ("transformer.h.{}.attn.c_q.weight", _heads_out),
    ("mixer", "k"): ("transformer.h.{}.attn.c_k.weight", _heads_out),
    ("mixer", "v"): ("transformer.h.{}.attn.c_v.weight", _heads_out),
    ("mixer", "o"): ("transformer.h.{}.attn.c_proj.weight", _heads_in),
    ("mixer", "value_gate"): ("transformer.h.{}.attn.ve_gate.weight", _transposed),
    ("mixer", "value_embedding"): ("value_embeds.{}.weight", _by_heads),
    ("mlp", "in"): ("transformer.h.{}.mlp.c_fc.weight", _transposed),
    ("mlp", "out"): ("transformer.h.{}.mlp.c_proj.weight", _transposed),
}
OCTOBER_ENDS = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
HEAD_ENDS = {
    "embed": "transformer.wte.weight",
    "head": "lm_head.weight",
    "resid_scale": "resid_lambdas",
    "x0_scale": "x0_lambdas",
    "smear_gate": "smear_gate.weight",
    "smear_scale": "smear_lambda",
    "backout_scale": "backout_lambda",
}


def padded(value: Array, shape: Any) -> Array:
    """The value with zeros behind its end along the vocabulary; every other size must be right."""
    assert sum(want != have for want, have in zip(shape.shape, value.shape, strict=True)) <= 1, (shape, value.shape)
    out = np.zeros(shape.shape, value.dtype)
    out[tuple(slice(size) for size in value.shape)] = value
    return out


def to_params(config: Model, state: dict[str, Array], layer: dict, ends: dict[str, str]) -> Any:
    """Our parameter tree (of weights or of gradients) from a state dict; the padded vocabulary is filled with zeros."""
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0))
    used = set()

    def take(name: str) -> Array:
        used.add(name)
        return state[name]

    def end(path: Any, shape: Any) -> Array:
        value = take(ends[path[-1].key])
        value = value.T if path[-1].key == "head" else value
        return padded(value.reshape(()) if shape.ndim == 0 else value[0] if value.ndim > shape.ndim else value, shape)

    def stacked(position: int, path: Any, shape: Any) -> Array:
        name, lay_out = layer[tuple(step.key for step in path)]
        mixer = config.pattern[position]
        indices = range(position, config.depth, len(config.pattern))
        return padded(np.stack([lay_out(take(name.format(i)), mixer) for i in indices]), shape)

    def layers(position: int, tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, shape: stacked(position, path, shape), tree)

    params = {
        "ends": jax.tree_util.tree_map_with_path(end, shapes["ends"]),
        "layers": tuple(layers(i, tree) for i, tree in enumerate(shapes["layers"])),
    }
    assert used == set(state), f"not placed: {set(state) - used}"
    return params
