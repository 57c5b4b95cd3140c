"""Parts against transformers: models of random weights, frequencies, buckets and sinks of tests/golden/parts.npz."""

import json
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from outside import read_arrays
from weights import checksum, random_weight

from jaxchat.export.places import Place, to_params
from jaxchat.model import (
    GELU,
    GQA,
    ALiBi,
    GeGLU,
    Layer,
    LayerNorm,
    Learned,
    Linear,
    Llama3,
    Model,
    RMSNorm,
    RoPE,
    Sinusoidal,
    SwiGLU,
    T5Buckets,
    Transformer,
    YaRN,
)
from jaxchat.model.dense import Scores, attend, visible, weights
from jaxchat.model.part import Context, Static
from jaxchat.model.positions import Rotary

pytestmark = pytest.mark.quick

Weights = dict[str, np.ndarray]


class Oracle(NamedTuple):
    """A model of ours, and how its parameters are found in the state dict of transformers.

    `names` gives the end of a name by that of ours. `fused` is the name of queries, keys and values in one, and whether
    they alternate by head. `stored` matrices are (inputs, outputs).
    """

    model: Model
    names: dict[str, str]
    layer: str
    fused: tuple[str, bool] | None = None
    stored: bool = False


def model(*layers: Layer, **fields: Any) -> Model:
    plain: dict[str, Any] = {"vocab": 64, "width": 32, "depth": 2, "pattern": layers, "softcap": None, "tied": True}
    return Model(**plain | {"embed_norm": False} | fields)


def heads(n: int = 4, **fields: Any) -> GQA:
    return GQA(**{"heads": n, "kv_heads": n, "head_dim": 6 if n == 6 else 8, "qk_norm": None} | fields)


def pairs(ours: str, theirs: str) -> dict[str, str]:
    return dict(zip(ours.split(), theirs.split(), strict=True))


LAYER, MORE, GAIN = LayerNorm(), RMSNorm(gain="1+w"), RMSNorm(1e-5, gain="w")
GATED = pairs(
    "mixer.q mixer.k mixer.v mixer.o mlp.gate mlp.in mlp.out final_norm.gain embed",
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj norm "
    "embed_tokens",
)

ORACLES = {
    "bloom": Oracle(
        model(
            Layer(heads(6, positions=ALiBi(), qkv_bias=True, o_bias=True), GELU(144, bias=True), LAYER),
            norm=LAYER,
            width=36,
            embed_norm=True,
        ),
        pairs(
            "mixer.o mlp.in mlp.out mixer_norm.gain mlp_norm.gain final_norm.gain embed_norm.gain embed",
            "self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h input_layernorm post_attention_layernorm ln_f "
            "word_embeddings_layernorm word_embeddings",
        ),
        "transformer.h",
        ("self_attention.query_key_value", True),
    ),
    "mpt": Oracle(
        model(
            Layer(heads(6, positions=ALiBi(order="mpt")), GELU(144, tanh=False), LayerNorm(bias=False)),
            norm=LayerNorm(bias=False),
            width=36,
        ),
        pairs(
            "mixer.o mlp.in mlp.out mixer_norm.gain mlp_norm.gain final_norm.gain embed",
            "attn.out_proj ffn.up_proj ffn.down_proj norm_1 norm_2 norm_f wte",
        ),
        "transformer.blocks",
        ("attn.Wqkv", False),
    ),
    "xglm": Oracle(
        model(
            Layer(
                heads(positions=Sinusoidal(offset=2), qkv_bias=True, o_bias=True),
                GELU(48, bias=True, tanh=False),
                LAYER,
            ),
            norm=LAYER,
            embed_scale=32**0.5,
        ),
        pairs(
            "mixer.q mixer.k mixer.v mixer.o mlp.in mlp.out mixer_norm.gain mlp_norm.gain final_norm.gain embed",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2 self_attn_layer_norm "
            "final_layer_norm layer_norm embed_tokens",
        ),
        "model.layers",
    ),
    "openai": Oracle(
        model(
            Layer(
                heads(positions=Learned(16), qkv_bias=True, o_bias=True), GELU(128, bias=True), LAYER, placement="after"
            ),
            final_norm=False,
        ),
        pairs(
            "mixer.o mlp.in mlp.out mixer_norm.gain mlp_norm.gain embed positions_0.table",
            "attn.c_proj mlp.c_fc mlp.c_proj ln_1 ln_2 tokens_embed positions_embed",
        ),
        "transformer.h",
        ("attn.c_attn", False),
        stored=True,
    ),
    "gemma2": Oracle(
        model(
            *(
                Layer(
                    heads(kv_heads=2, window=window, positions=RoPE(direction=1), scale=24**-0.5, softcap=2.0),
                    GeGLU(48),
                    MORE,
                    placement="sandwich",
                )
                for window in (4, None)
            ),
            norm=MORE,
            softcap=5.0,
            embed_scale=32**0.5,
        ),
        GATED
        | pairs(
            "mixer_norm.gain mixer_norm_after.gain mlp_norm.gain mlp_norm_after.gain",
            "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm",
        ),
        "model.layers",
    ),
    "olmo2": Oracle(
        model(
            Layer(
                heads(kv_heads=2, positions=RoPE(direction=1), qk_norm=GAIN, qk_norm_first=True, qk_norm_whole=True),
                SwiGLU(48),
                GAIN,
                placement="inside",
            ),
            norm=GAIN,
            tied=False,
        ),
        GATED
        | pairs(
            "mixer_norm.gain mlp_norm.gain mixer.q_norm.gain mixer.k_norm.gain head",
            "post_attention_layernorm post_feedforward_layernorm self_attn.q_norm self_attn.k_norm lm_head",
        ),
        "model.layers",
    ),
}


def state_of(oracle: Oracle, theirs: Weights) -> Weights:
    """Their weights by our names, NAME for the ends and LAYER.NAME for the layers, matrices as (outputs, inputs)."""
    ours, found = {end: name for name, end in oracle.names.items()}, {}
    for name, value in theirs.items():
        end, _, kind = name.rpartition(".")
        inside = re.fullmatch(rf"{re.escape(oracle.layer)}\.(\d+)\.(.+)", end)
        prefix, end = (f"{inside[1]}.", inside[2]) if inside else ("", end.rpartition(".")[2])
        if oracle.stored and value.ndim == 2 and inside:
            value = value.T
        if oracle.fused and end == oracle.fused[0]:
            parts = (-1, 3, oracle.model.pattern[0].mixer.head_dim) if oracle.fused[1] else (3, -1)
            split = value.reshape(*parts, *value.shape[1:])
            split = split.swapaxes(0, 1) if oracle.fused[1] else split
            names = [f"{prefix}mixer.{one}{'_bias' * (kind == 'bias')}" for one in "qkv"]
            found |= {one: part.reshape(-1, *value.shape[1:]) for one, part in zip(names, split, strict=True)}
        else:
            of_norm = ours[end].endswith(".gain") and kind == "bias"
            our = ours[end].replace(".gain", ".bias") if of_norm else ours[end] + "_bias" * (kind == "bias")
            found[prefix + our] = value
    return found


def places(config: Model) -> dict[tuple[str, ...], Place]:
    """Every parameter's place in `state_of`."""
    found: dict[tuple[str, ...], Place] = {}

    def add(path: Any, spec: Any) -> None:
        names = tuple(step.key for step in path[1:] if hasattr(step, "key"))
        within = "{}." if path[0].key == "layers" else ""
        found[names] = Place(within + ".".join(names), linear=spec.group in ("matrices", "head"))

    jax.tree_util.tree_map_with_path(add, Transformer(config).specs())
    return found


@pytest.mark.parametrize("name", ORACLES)
def test_a_model_of_random_weights_has_the_logits_of_transformers(name: str) -> None:
    golden, oracle = read_arrays("parts"), ORACLES[name]
    wanted, shapes = json.loads(str(golden[f"{name}/about"]))
    theirs = {key: random_weight(key, tuple(shape)) for key, shape in shapes.items()}
    assert checksum(theirs) == wanted, "these are other weights than the golden file's"
    params = to_params(oracle.model, state_of(oracle, theirs), places(oracle.model))
    transformer = Transformer(oracle.model)
    logits_TV = transformer.logits(params, transformer.apply(params, golden["tokens"][None]).hidden)[0]
    assert np.abs(logits_TV - golden[f"{name}/logits"]).max() < 1e-4


SCALED = {
    "linear": RoPE(500_000.0, 1, Linear(8.0)),
    "llama3": RoPE(500_000.0, 1, Llama3(32.0)),
    "yarn": RoPE(500_000.0, 1, YaRN(40.0, 4096)),
    "yarn_part": RoPE(500_000.0, 1, YaRN(4.0, 512, 16.0, 2.0, attention=1.5, whole=False), share=0.5),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies_equal_those_of_transformers(name: str) -> None:
    *wanted, amplitude = read_arrays("parts")[f"frequencies/{name}"]
    np.testing.assert_allclose(Rotary.frequencies(SCALED[name], 64, jnp.float32), wanted, rtol=3e-6)
    scaling: Any = SCALED[name].scaling
    assert scaling.amplitude == pytest.approx(amplitude)


@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20)])
def test_buckets_equal_those_of_t5(buckets: int, longest: int) -> None:
    wanted = read_arrays("parts")[f"buckets/{buckets}_{longest}"]
    found = T5Buckets(buckets, longest).of_distance()
    np.testing.assert_array_equal(found[np.minimum(np.arange(len(wanted)), longest)], wanted)


def test_sinks_take_the_weight_that_they_take_in_gpt_oss() -> None:
    q_HTD, k_KTD, v_KTD, sinks_H = (
        random_weight(name, shape)
        for name, shape in (("q", (4, 7, 8)), ("k", (2, 7, 8)), ("v", (2, 7, 8)), ("sinks", (4,)))
    )
    index_1T = np.arange(7)[None]
    seen_1TT = visible(index_1T, index_1T)
    q_1THD = jnp.asarray(q_HTD.swapaxes(0, 1)[None])
    o_1THD = attend(q_1THD, k_KTD[None], v_KTD[None], seen_1TT, Scores(sinks_H=jnp.asarray(sinks_H)))
    wanted = read_arrays("parts")["sinks/output"]
    np.testing.assert_allclose(o_1THD[0], wanted, atol=1e-6)
    w_1HTT = weights(q_1THD, k_KTD.swapaxes(0, 1)[None], seen_1TT, sinks_H=jnp.asarray(sinks_H))
    mixed_THD = np.einsum("HTS,HSD->THD", w_1HTT[0], np.repeat(v_KTD, 2, axis=0))
    np.testing.assert_allclose(mixed_THD, wanted, atol=1e-6)


def test_pairs_of_neighbours_turn_like_halves() -> None:
    """Interleaved pairs are the rotation by halves of the channels in another order; the share that is left is last."""

    x_BTHD = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 2, 12)), jnp.float32)
    order = [*range(0, 8, 2), *range(1, 8, 2)]
    positions_BT = np.arange(5)[None]

    def turned(config: RoPE, x_BTHD: Any) -> Any:
        context = Context(positions_BT, positions_BT, None)
        context = context._replace(shared=Rotary.share(config, 12, context, jnp.float32))
        return Rotary(config, Static(1, 1)).apply({}, x_BTHD, context, method="rotate")

    halves = turned(RoPE(share=2 / 3), x_BTHD.at[..., :8].set(x_BTHD[..., order]))
    neighbours = turned(RoPE(share=2 / 3, interleaved=True), x_BTHD)
    np.testing.assert_allclose(neighbours[..., order], halves[..., :8], atol=1e-6)
    np.testing.assert_array_equal(neighbours[..., 8:], x_BTHD[..., 8:])
    np.testing.assert_array_equal(halves[..., 8:], x_BTHD[..., 8:])
    full = turned(RoPE(), x_BTHD)
    assert not np.allclose(full[..., 8:], x_BTHD[..., 8:])
    longer = turned(RoPE(scaling=YaRN(4.0, 8)), x_BTHD)
    np.testing.assert_allclose(np.linalg.norm(longer), (0.1 * np.log(4) + 1) * np.linalg.norm(x_BTHD), rtol=1e-6)
