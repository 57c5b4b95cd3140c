"""A small model for every row of the tables of parts, for test_parts.py, and what its relations are computed with.

A new row of MIXERS, MLPS, NORMS, PLACEMENTS or POSITIONS joins by standing in a model of EXAMPLES: in one that is
there, or in one of its own. An example has a vocabulary that needs no padding, and heads and hidden units that its mesh
divides.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import small

from jaxchat import sharding
from jaxchat.model import (
    GELU,
    GQA,
    MLA,
    ALiBi,
    Backout,
    GeGLU,
    Layer,
    LayerNorm,
    Learned,
    Linear,
    Llama3,
    Model,
    MoE,
    ReluSquared,
    ResidualScales,
    RMSNorm,
    RoPE,
    Sinusoidal,
    Smear,
    SwiGLU,
    T5Buckets,
    Transformer,
    ValueEmbedding,
    YaRN,
)
from jaxchat.model.attention import MIXERS
from jaxchat.model.layer import PLACEMENTS
from jaxchat.model.mlp import MLPS
from jaxchat.model.norms import NORMS
from jaxchat.model.positions import POSITIONS
from jaxchat.objectives.likelihood import Likelihood

TABLES: dict[str, Any] = {
    "MIXERS": MIXERS,
    "MLPS": MLPS,
    "NORMS": NORMS,
    "PLACEMENTS": PLACEMENTS,
    "POSITIONS": POSITIONS,
}
ROWS, LENGTH = 4, 16  # Of one batch; a mesh gets two of them at once.


class Example(NamedTuple):
    """A model, and the sizes of a mesh of eight devices that splits everything that it has.

    `flops` is a count by hand of the training FLOPs per token in rows of LENGTH, for parts that compute more than their
    share; None counts the products of the compiled program. `losses`: the model has losses of its own, whose
    gradient reaches every document.
    """

    model: Model
    mesh: sharding.Mesh = sharding.Mesh(2, 2, 2)
    flops: int | None = None
    losses: bool = False


def model(*layers: Layer, **fields: Any) -> Model:
    """Two layers, or each of these once."""
    sizes: dict[str, Any] = {"vocab": 64, "width": 16, "depth": max(2, len(layers)), "pattern": layers}
    return Model(**sizes | fields)


def gqa(**fields: Any) -> GQA:
    return GQA(**{"heads": 4, "kv_heads": 2, "head_dim": 4} | fields)


GAIN, ONE_MORE = RMSNorm(gain="w"), RMSNorm(gain="1+w")
EXAMPLES = {
    "july2026": Example(
        model(
            Layer(gqa(window=3, qk_scale=1.2), ReluSquared(24)),
            Layer(gqa(value_embedding=ValueEmbedding(gate_channels=4)), ReluSquared(24)),
            depth=4,
            residual_scales=ResidualScales(),
            smear=Smear(channels=8),
            backout=Backout(),
        )
    ),
    "mixed": Example(
        model(
            Layer(gqa(heads=2, head_dim=8, window=1, positions=RoPE(direction=1)), SwiGLU(24)),
            Layer(gqa(window=4, positions=None, qk_norm=None), ReluSquared(24)),
            softcap=None,
        )
    ),
    "gpt2": Example(
        model(
            Layer(
                gqa(positions=Learned(LENGTH), qk_norm=None, qkv_bias=True, o_bias=True, dropout=0.2),
                GELU(24, bias=True),
                norm=LayerNorm(),
                dropout=0.2,
            ),
            norm=LayerNorm(),
            embed_norm=False,
            dropout=0.2,
        )
    ),
    "gemma": Example(
        model(
            *(
                Layer(
                    gqa(window=w, positions=p, qk_norm=ONE_MORE, qk_norm_first=True, scale=0.3, softcap=2.0),
                    GeGLU(24),
                    norm=ONE_MORE,
                    placement="sandwich",
                )
                for w, p in ((4, RoPE()), (None, RoPE(1e6, 1, Linear(8.0))))
            ),
            norm=ONE_MORE,
            embed_norm=False,
            embed_scale=4.0,
        )
    ),
    "olmo2": Example(
        model(
            Layer(
                gqa(positions=RoPE(scaling=YaRN(4.0, 8)), qk_norm=GAIN, qk_norm_first=True, qk_norm_whole=True),
                SwiGLU(24, bias=True),
                norm=GAIN,
                placement="inside",
            ),
            norm=GAIN,
            embed_norm=False,
        )
    ),
    "after": Example(
        model(
            Layer(
                gqa(positions=Sinusoidal(offset=2), sinks=True),
                ReluSquared(24, bias=True),
                norm=LayerNorm(bias=False),
                placement="after",
            ),
            Layer(
                gqa(heads=6, kv_heads=6, positions=ALiBi(), qk_norm=RMSNorm(bias=True)),
                GELU(24, tanh=False),
                norm=LayerNorm(),
                placement="after",
            ),
            final_norm=False,
        )
    ),
    "t5": Example(
        model(
            Layer(gqa(positions=T5Buckets(4, 8), qk_norm=None, scale=1.0), GELU(24), norm=GAIN),
            Layer(
                gqa(head_dim=8, positions=RoPE(1e4, 1, Llama3(8.0, length=16), share=0.5, interleaved=True)),
                GeGLU(24, tanh=False),
            ),
        )
    ),
    "latent": Example(
        model(
            Layer(MLA(heads=4, head_dim=4, rope_dim=2, value_dim=6, kv_rank=8, q_rank=6, norm=GAIN), SwiGLU(24)),
            Layer(MLA(heads=2, head_dim=6, rope_dim=4, value_dim=4, kv_rank=6), SwiGLU(24)),
        )
    ),
    "experts": Example(
        model(
            Layer(gqa(), MoE(experts=8, active=3, hidden=6, shared=8, groups=4, top_groups=2, scale=2.5)),
            Layer(gqa(), MoE(4, 2, 10, router="softmax", gated=False, gate="before", path="masked")),
        ),
        sharding.Mesh(1, 2, 2, 2),
        # Head, projections of attention, then router, active and shared experts of both layers; and attention.
        6 * (64 * 16 + 2 * 768 + (16 * 8 + 3 * 16 * (3 * 6 + 8)) + (16 * 4 + 2 * 16 * 2 * 10))
        + 2 * 12 * 4 * 4 * LENGTH,
    ),
}


def rows_of(model: Model) -> set[tuple[str, Any]]:
    """The rows of the tables that a model uses."""
    found: set[tuple[str, Any]] = {("NORMS", type(model.norm))}
    for layer in model.layers:
        parts = {"MIXERS": layer.mixer, "MLPS": layer.mlp, "NORMS": layer.norm}
        parts["POSITIONS"] = getattr(layer.mixer, "positions", None)
        found |= {(table, type(part)) for table, part in parts.items()} | {("PLACEMENTS", layer.placement)}
    return found


def batch(rows: int, vocab: int, seed: int = 1) -> dict[str, np.ndarray]:
    return small.batch(rows, LENGTH, vocab, np.float64, seed)


def parameters(config: Model) -> Any:
    return jax.tree.map(jnp.asarray, small.parameters(config, np.float64))


class Result(NamedTuple):
    """What a model makes of a batch: the sum that training minimises, its weight, gradients, and logits (B, T, V)."""

    total: Any
    weight: Any
    gradients: Any
    logits: Any


def _result(config: Model, params: Any, batch: Any) -> Result:
    transformer = Transformer(config, jnp.float64)

    def total(params: Any) -> Any:
        found = Likelihood()(transformer, params, batch)
        hidden_BTM = transformer.apply(params, batch["tokens"], segments_BT=batch["segments"]).hidden
        return found.total, (found.weight, transformer.logits(params, hidden_BTM))

    (loss, (weight, logits_BTV)), gradients = jax.value_and_grad(total, has_aux=True)(params)
    return Result(loss, weight, gradients, logits_BTV)


@functools.cache
def program(config: Model) -> Any:
    """The compiled gradient of a model; call it inside `jax.enable_x64`."""
    return jax.jit(functools.partial(_result, config))


def result(config: Model, batch: Any) -> Result:
    """On one device, in float64, with random parameters."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, program(config)(parameters(config), batch))


def result_on_mesh(example: Example, batch: Any) -> Result:
    """On eight devices, with parameters and gradients placed as training places them."""
    config = example.model
    mesh = sharding.make_mesh(example.mesh, rows=len(batch["tokens"]))
    with jax.enable_x64(True), jax.set_mesh(mesh):
        params = parameters(config)
        placed = sharding.placements(mesh, params, Transformer(config).axes())
        params, batch = jax.device_put(params, placed), jax.device_put(batch, sharding.by_rows(mesh))
        call = jax.jit(functools.partial(_result, config), out_shardings=Result(None, None, placed, None))
        return jax.tree.map(np.asarray, call(params, batch))


PIECE = 4
# What each row is given call by call, longest 4: rows stand at different positions, and the second waits once.
PIECES = ((4, 3), (4, 0), (2, 4), *((1, 1),) * 5)


def assert_cached_equals(config: Model, params: Any, tokens_BT: Any, logits_BTV: Any, tolerance: float = 1e-11) -> Any:
    """Two rows decoded piece by piece have these logits; returns the last cache. Call it inside `jax.enable_x64`."""
    transformer = Transformer(config, jnp.float64)
    by_layer = transformer.unstack(params)

    @jax.jit
    def extend(tokens_BT: Any, positions_BT: Any, cache: Any) -> Any:
        hidden_BTM, cache, _, _ = transformer.apply(by_layer, tokens_BT, positions_BT=positions_BT, cache=cache)
        return transformer.logits(by_layer, hidden_BTM), cache

    cache, seen = transformer.empty_cache(2, LENGTH, write=PIECE), np.zeros(2, int)
    for sizes in PIECES:
        tokens = np.zeros((2, PIECE if max(sizes) > 1 else 1), np.int32)
        positions = np.full(tokens.shape, -1, np.int32)
        for row, size in enumerate(sizes):
            tokens[row, :size] = tokens_BT[row, seen[row] : seen[row] + size]
            positions[row, :size] = np.arange(seen[row], seen[row] + size)
        found_BTV, cache = extend(tokens, positions, cache)
        for row, size in enumerate(sizes):
            wanted = logits_BTV[row, seen[row] : seen[row] + size]
            np.testing.assert_allclose(found_BTV[row, :size], wanted, rtol=0, atol=tolerance)
        seen += sizes
    assert seen.max() == 15
    return cache


def product_flops(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products in a program; of a choice, those of its largest branch."""
    flops = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            inner = np.prod([eqn.invars[0].aval.shape[axis] for axis in left], dtype=int)
            flops += 2 * int(inner) * int(np.prod(eqn.outvars[0].aval.shape, dtype=int))
        inner = [
            getattr(x, "jaxpr", x) for part in eqn.params.values() for x in (part if type(part) is tuple else (part,))
        ]
        counts = [product_flops(x) for x in inner if hasattr(x, "eqns")]
        if counts:
            flops += eqn.params.get("length", 1) * (max if eqn.primitive.name == "cond" else sum)(counts)
    return flops
