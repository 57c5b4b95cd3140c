"""Multi-head latent attention: equal to transformers, and its cache, which decoding reads without keys and values."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from weights import checksum, random_weight

from jaxchat.model import MLA, Layer, Model, RMSNorm, RoPE, SwiGLU, Transformer, YaRN
from jaxchat.model.attention import MIXERS
from jaxchat.model.backends import differs, kernel_calls
from jaxchat.model.latent import LatentAttention
from jaxchat.model.part import Context, Static
from jaxchat.model.trace import trace

pytestmark = pytest.mark.quick

GOLDEN = np.load(Path(__file__).parent / "golden" / "blocks.npz")
WIDTH, LENGTH, FAR = 32, 16, 3000
PLAIN = RoPE(base=10_000.0, direction=1)
MIXER = MLA(heads=4, head_dim=8, rope_dim=4, value_dim=6, kv_rank=12, q_rank=10, positions=PLAIN, norm=RMSNorm(1e-6))


def block_weights(name: str, queries: bool) -> dict[str, np.ndarray]:
    """The weights that transformers' block was given."""
    shapes = {"o_proj": (WIDTH, 24), "kv_a_proj_with_mqa": (16, WIDTH), "kv_b_proj": (56, 12), "kv_a_layernorm": (12,)}
    shapes |= (
        {"q_a_proj": (10, WIDTH), "q_b_proj": (48, 10), "q_a_layernorm": (10,)} if queries else {"q_proj": (48, WIDTH)}
    )
    arrays = {}
    for key, shape in shapes.items():
        arrays[f"{key}.weight"] = random_weight(f"{name}/{key}.weight", shape)
    return arrays


def halves(w: np.ndarray) -> np.ndarray:
    """Rotary channels (..., R), which DeepSeek pairs with their neighbours, in our order: one of each pair first."""
    return np.concatenate([w[..., 0::2], w[..., 1::2]], axis=-1)


def ours(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters; the norms' weights go into the matrices after them."""
    w = {key.removesuffix(".weight"): value.T for key, value in arrays.items()}
    down, up = w["kv_a_proj_with_mqa"], w["kv_a_layernorm"][:, None] * w["kv_b_proj"]
    up = up.reshape(12, 4, 14)
    q = w["q_a_layernorm"][:, None] * w["q_b_proj"] if "q_b_proj" in w else w["q_proj"]
    q = q.reshape(-1, 4, 12)
    params = {
        "kv_down": down[:, :12],
        "k_rope": halves(down[:, 12:]),
        "k_up": up[..., :8],
        "v_up": up[..., 8:],
        "o": w["o_proj"].reshape(4, 6, WIDTH),
        "q_up" if "q_b_proj" in w else "q": np.concatenate([q[..., :8], halves(q[..., 8:])], axis=-1),
    }
    return params | ({"q_down": w["q_a_proj"]} if "q_b_proj" in w else {})


def golden(name: str, mixer: MLA, tolerance: float) -> None:
    arrays = block_weights(name, mixer.q_rank is not None)
    x_BTM, probe = (random_weight(f"{name}/{key}", (2, LENGTH, WIDTH)) for key in ("x", "probe"))
    assert checksum({**arrays, "x": x_BTM, "probe": probe}) == GOLDEN[f"{name}/checksum"]
    positions_BT = jnp.arange(LENGTH, dtype=jnp.int32)[None] + jnp.array([[0], [FAR]], jnp.int32)
    context = Context(positions_BT, positions_BT, None)
    context = context._replace(shared=LatentAttention.share(mixer, context, jnp.float32))
    module = LatentAttention(mixer, Static(WIDTH, 64))

    @jax.jit
    def call(params: Any, x_BTM: Any) -> Any:
        y_BTM = module.apply({"params": params}, x_BTM, context, None)[0]
        return jnp.sum(y_BTM * probe), y_BTM

    with jax.default_matmul_precision("highest"):
        grads, y_BTM = jax.grad(call, argnums=(0, 1), has_aux=True)(ours(arrays), x_BTM)
    gain = arrays["kv_a_layernorm.weight"][:, None]
    kv_b = np.concatenate([grads[0]["k_up"], grads[0]["v_up"]], axis=-1).reshape(12, 56) * gain
    for ours_, theirs in ((y_BTM, "y"), (grads[1], "dx"), (kv_b.T, "gradients/kv_b_proj.weight")):
        small.assert_close(ours_, GOLDEN[f"{name}/{theirs}"], tolerance)


@pytest.mark.parametrize(("name", "rank"), [("mla", 10), ("mla_plain_queries", None)])
def test_latent_attention_equals_transformers(name: str, rank: int | None) -> None:
    golden(name, dataclasses.replace(MIXER, q_rank=rank), 1e-4)


def test_yarn_scales_the_scores_as_in_transformers() -> None:
    """mscale and mscale_all_dim of 1: cosines as they are, and scores times (0.1 ln 40 + 1)^2."""
    scaling = YaRN(40.0, 128, attention=1.0, scores=(0.1 * math.log(40) + 1) ** 2)
    golden("mla_yarn", dataclasses.replace(MIXER, positions=RoPE(10_000.0, 1, scaling)), 1e-4)


def model(**changes: Any) -> Model:
    fields: dict[str, Any] = {"heads": 4, "head_dim": 4, "rope_dim": 2, "value_dim": 6, "kv_rank": 8}
    layer = Layer(MLA(**{"positions": RoPE(direction=1), **fields, **changes}), SwiGLU(24))
    return Model(vocab=60, width=16, depth=2, pattern=(layer,))


def test_the_cache_is_one_latent_and_one_rotated_key() -> None:
    """kv_rank + rope_dim numbers per token and layer, for any number of heads: DeepSeek-V3's 576."""
    large = dataclasses.replace(MIXER, heads=128, head_dim=128, rope_dim=64, value_dim=128, kv_rank=512, q_rank=1536)
    for mixer, numbers in ((MIXER, 16), (large, 576)):
        cache = LatentAttention.empty(mixer, 3, 10, write=1, dtype=jnp.bfloat16)
        assert sum(leaf.size for leaf in cache) == 3 * 10 * numbers


def test_absorbed_products_and_whole_keys_decode_alike() -> None:
    """A long call with a cache computes keys and values, a short one absorbs them: both equal the call without one."""
    config = model(kv_rank=8, head_dim=2, value_dim=2)
    mixer, tokens_BT = config.pattern[0].mixer, np.random.default_rng(0).integers(0, 60, (2, 12)).astype(np.int32)
    with jax.enable_x64(True):
        transformer = Transformer(config, jnp.float64)
        params = transformer.unstack(jax.tree.map(jnp.asarray, small.parameters(config, np.float64)))
        expected = jax.jit(transformer.apply)(params, tokens_BT).hidden
        extend = jax.jit(lambda tokens, at, cache: transformer.apply(params, tokens, positions_BT=at, cache=cache))
        for pieces in ((12,), (8, 1, 1, 1, 1)):
            cache, start, found = transformer.empty_cache(2, 12, write=12), 0, []
            for size in pieces:
                rows = slice(start, start + size)
                positions = np.arange(start, start + size, dtype=np.int32)[None].repeat(2, 0)
                forward = extend(tokens_BT[:, rows], positions, cache)
                cache, start = forward.cache, start + size
                found.append(forward.hidden)
            np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=1e-11)

        def heads_read(size: int) -> set[int]:
            """The numbers of heads with which a call's products read the cache."""
            cache = transformer.empty_cache(2, 12, write=12)
            at = jnp.zeros((2, size), jnp.int32)
            call = lambda tokens_BT: transformer.apply(params, tokens_BT, positions_BT=at, cache=cache).hidden  # noqa: E731
            text = str(jax.make_jaxpr(call)(tokens_BT[:, :size]))
            return {n for n, size in ((1, 10), (mixer.heads, 4)) if f"[2,{n},12,{size}]" in text}

        assert heads_read(1) == {1} and mixer.heads in heads_read(12)


def test_fused_kernels_get_heads_of_one_size() -> None:
    """The interpreted kernel for TPUs, with values smaller and larger than keys."""
    for value_dim in (4, 12):
        config = model(value_dim=value_dim)
        params = jax.tree.map(jnp.asarray, small.parameters(config))
        tokens_BT = np.random.default_rng(0).integers(0, 60, (2, 12)).astype(np.int32)
        expected, found = (
            jax.jit(Transformer(config, attention=name).apply)(params, tokens_BT).hidden
            for name in ("xla", "splash_interpreted")
        )
        np.testing.assert_allclose(found, expected, atol=2e-5)
    (call,) = kernel_calls(config)
    assert (call.heads, call.kv_heads, call.head_dim) == (4, 4, 12)
    assert differs("xla", 20, "float32", True, call.heads, call.kv_heads, call.head_dim, False) is None


def test_a_trace_shows_the_heads() -> None:
    config = model()
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    traced = jax.jit(lambda params: trace(Transformer(config), params, jnp.arange(9)[None]))(params)
    assert [a.q_BTHD.shape for a in traced.attended if a is not None] == [(1, 9, 4, 6)] * 2
    assert traced.attended[0] is not None and traced.attended[0].o_BTHD.shape == (1, 9, 4, 6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"rope_dim": 3}, "rope_dim=3 must be even"), ({"kv_rank": 0}, "kv_rank .* must be positive")],
)
def test_wrong_sizes_are_refused(change: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        model(**change)


def test_flops_count_every_matrix() -> None:
    for mixer in (MIXER, dataclasses.replace(MIXER, q_rank=None)):
        config = dataclasses.replace(model(), pattern=(Layer(mixer, SwiGLU(24)),))
        shapes = jax.tree.leaves(Transformer(config).shapes()["layers"][0]["mixer"])
        assert MIXERS[MLA].matmul_parameters(mixer, 16) == sum(leaf.size for leaf in shapes) // 2
    # Scores over 12 channels and values of 6, forward and twice backward, for 16 keys.
    assert MIXERS[MLA].attention_flops(MIXER, 16) == 3 * 2 * 4 * (12 + 6) * 16
