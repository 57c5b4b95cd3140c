"""Attention by every backend that runs here equals a float64 reference, forward and gradient; others on `-m gpu`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from jaxchat import sharding
from jaxchat.errors import UserError
from jaxchat.model import GQA, Transformer, backends, kernels
from jaxchat.model.kernels import BACKENDS, AttentionCase, find_runs, unsupported

HERE = ("xla", "xla_remat", "splash_interpreted")
BLOCK = 128


class Case(NamedTuple):
    """A mask and heads; `borders` are where documents of the row begin, none for a row that is not isolated."""

    length: int = 3 * BLOCK  # Three blocks of splash attention.
    heads: int = 2
    kv_heads: int = 1
    window: int | None = None
    borders: tuple[int, ...] | None = None


CASES = (
    Case(),
    Case(heads=4, kv_heads=2, borders=(BLOCK, 2 * BLOCK, 2 * BLOCK + 1)),
    Case(length=300, window=1, borders=(5, 250)),
    Case(kv_heads=2, window=BLOCK + 2, borders=(40, BLOCK - 1)),
    Case(window=500),
)


def arrays(case: Case, size: int = 8, rows: int = 1) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Queries, keys, values and a weight for every output; and segments, or None."""
    generator = np.random.default_rng(3)
    count = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    drawn = [generator.standard_normal((rows, case.length, n, size)) for n in count]
    if case.borders is None:
        return drawn, None
    ids_T = np.searchsorted(case.borders, np.arange(case.length), side="right")
    return drawn, np.repeat(ids_T[None], rows, 0).astype(np.int32)


def evaluated(attend: Any, case: Case, dtype: Any) -> list[np.ndarray]:
    """Attention and the gradients of a weighted sum of it, by q, k and v."""
    drawn, segments = arrays(case)
    q, k, v, weight = (jnp.asarray(x, dtype) for x in drawn)

    def total(q: Any, k: Any, v: Any) -> Any:
        o = attend(q, k, v, None if segments is None else jnp.asarray(segments), case.window)
        return jnp.sum(o * weight), o

    gradients, o = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float64) for x in (o, *gradients)]


def plain(q: Any, k: Any, v: Any, segments: Any, window: int | None) -> Any:
    """Attention in one expression, to be differentiated; the mask is that of the reference, in words of its own."""
    G, T = q.shape[2] // k.shape[2], q.shape[1]
    s = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, G, 2)) / q.shape[3] ** 0.5
    back = np.arange(T)[:, None] - np.arange(T)[None]
    seen = jnp.asarray((back >= 0) & (back <= (T if window is None else window)))[None, None]
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(seen, s, -jnp.inf)), jnp.repeat(v, G, 2))


@functools.cache
def expected(case: Case) -> list[np.ndarray]:
    """In float64; the attention is also that of tests/reference.py, one query at a time."""
    with jax.enable_x64(True):
        found = evaluated(plain, case, jnp.float64)
    drawn, segments = arrays(case)
    index = np.arange(case.length)[None]
    same = {"q_segments_BT": segments, "k_segments_BS": segments}
    o = reference.attention(*drawn[:3], q_positions_BT=index, k_positions_BS=index, window=case.window, **same)
    np.testing.assert_allclose(found[0], o, rtol=0, atol=1e-12)
    return found


def assert_equal(found: list[np.ndarray], case: Case, tolerance: float) -> None:
    for part, ours, theirs in zip(("o", "dq", "dk", "dv"), found, expected(case), strict=True):
        gap = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert gap <= tolerance, f"{part} differs by {gap:.1e} of its largest value"


def test_every_backend_is_tested_here() -> None:
    assert set(HERE) | {"cudnn", "splash"} == set(BACKENDS)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", HERE)
def test_attention_and_its_gradient_equal_the_reference(name: str, case: Case) -> None:
    assert_equal(evaluated(BACKENDS[name], case, jnp.float32), case, 3e-6)


def across(name: str, dtype: Any) -> tuple[np.ndarray, ...]:
    """The gradient, by the first document's keys and values, of what the second attends to; and by all values."""
    border = 100
    (q, k, v, weight), segments = arrays(Case(borders=(border,)))
    weight[:, :border] = 0

    def total(k: Any, v: Any) -> Any:
        return jnp.sum(BACKENDS[name](jnp.asarray(q, dtype), k, v, jnp.asarray(segments), None) * weight)

    found = jax.jit(jax.grad(total, (0, 1)))(jnp.asarray(k, dtype), jnp.asarray(v, dtype))
    dk, dv = (np.asarray(x, np.float64) for x in found)
    return dk[:, :border], dv[:, :border], dv


@pytest.mark.parametrize("name", HERE)
def test_no_gradient_crosses_into_another_document(name: str) -> None:
    *crossing, whole = across(name, jnp.float32)
    assert np.any(whole)
    for part in crossing:
        np.testing.assert_array_equal(part, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cudnn_equals_the_reference(case: Case) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: python -m pytest -n0 -m gpu tests/test_kernels.py")
    assert_equal(evaluated(BACKENDS["cudnn"], case, jnp.bfloat16), case, 0.03)
    if case.borders is not None:
        *crossing, _ = across("cudnn", jnp.bfloat16)
        assert not any(map(np.any, crossing))


@pytest.mark.parametrize("mesh", [(2, 1, 2), (1, 2, 1)], ids=str)
def test_splash_on_a_mesh_equals_one_device(mesh: tuple[int, int, int]) -> None:
    case = Case(length=BLOCK, heads=4, kv_heads=2, window=20, borders=(30,))
    (q, k, v, weight), segments = arrays(case, rows=2)
    q, k, v, weight = (jnp.asarray(x, jnp.float32) for x in (q, k, v, weight))

    @jax.jit
    def run(q: Any, k: Any, v: Any) -> Any:
        def total(q: Any, k: Any, v: Any) -> Any:
            o_BTHD = BACKENDS["splash_interpreted"](q, k, v, jnp.asarray(segments), 20)
            return jnp.sum(o_BTHD * weight), o_BTHD

        # Not the total: its terms cancel, and their order of summation differs between meshes.
        grads, o_BTHD = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return o_BTHD, grads

    alone = run(q, k, v)
    with jax.set_mesh(sharding.make_mesh(sharding.Mesh(*mesh), rows=2)):
        assert "shard_map" in str(jax.make_jaxpr(run)(q, k, v))
        small.assert_close(run(q, k, v), alone, 1e-6)


def test_kv_heads_that_a_mesh_does_not_divide_are_refused() -> None:
    (q, k, v, _), _ = arrays(Case(length=BLOCK, heads=4, kv_heads=1))
    with (
        jax.set_mesh(sharding.make_mesh(sharding.Mesh(1, 1, 2), rows=1)),
        pytest.raises(ValueError, match=r"1 kv heads .*: set a smaller --mesh.tensor"),
    ):
        jax.eval_shape(lambda: BACKENDS["splash_interpreted"](*map(jnp.asarray, (q, k, v)), None, None))
    with jax.set_mesh(sharding.make_mesh(sharding.Mesh(1, 1, 1), rows=1)):
        jax.eval_shape(lambda: BACKENDS["splash_interpreted"](*map(jnp.asarray, (q, k, v)), None, None))


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_model_with_splash_gives_the_gradient_of_one_without(loop: str) -> None:
    config = small.july2026(layer_loop=loop, remat="attention", depth=2, backout=None)
    params, batch = small.parameters(config), small.batch(2, 12, config.vocab)
    probe = np.random.default_rng(0).standard_normal((2, 12, config.width)).astype(np.float32)

    def gradient(attention: str) -> Any:
        def total(params: Any) -> Any:
            hidden, _, _, _ = Transformer(config, jnp.float32, attention).apply(
                params, batch["tokens"], segments_BT=batch["segments"]
            )
            return jnp.sum(hidden * probe)

        return jax.jit(jax.grad(total))(jax.tree.map(jnp.asarray, params))

    small.assert_close(gradient("splash_interpreted"), gradient("xla"), 3e-5)


def runs_by_hand(row: np.ndarray, most: int) -> tuple[list[int], list[int], int]:
    starts = [t for t in range(len(row)) if t == 0 or row[t] != row[t - 1]]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(row)])]
    more = [-1] * max(0, most - len(starts))
    return (starts + more)[:most], (lengths + more)[:most], len(starts)


def test_runs_equal_a_loop_over_the_row() -> None:
    generator = np.random.default_rng(1)
    rows = [np.sort(generator.integers(0, high, 17)) for high in (1, 2, 4, 30)]
    segments = np.stack([*rows, np.arange(17), np.repeat([3, 9], [16, 1])]).astype(np.int32)
    for most in (2, 5, 17, 20):
        found = find_runs(jnp.asarray(segments), most)
        for b, row in enumerate(segments):
            mine = found.start_BN[b].tolist(), found.length_BN[b].tolist(), int(found.count_B[b])
            assert mine == runs_by_hand(row, most)
        assert found.start_BN.dtype == found.length_BN.dtype == jnp.int32


@pytest.mark.parametrize("documents", [3, kernels.MOST_RUNS, kernels.MOST_RUNS + 1])
def test_rows_of_too_many_documents_are_attended_to_all_the_same(documents: int) -> None:
    """A stand-in for cuDNN, which isolates the runs that it is told of and gives twice what it should."""

    def packed(q: Any, k: Any, v: Any, start: Any, length: Any, window: int | None) -> Any:
        inside = (jnp.arange(q.shape[1])[None, :, None] >= start[:, None]) & (start[:, None] >= 0)
        return 2 * plain(q, k, v, inside.sum(-1), window)

    case = Case(length=40, window=3, borders=tuple(range(1, documents)))
    scale = 2 if documents <= kernels.MOST_RUNS else 1

    def attend(q: Any, k: Any, v: Any, segments: Any, window: int | None) -> Any:
        return kernels.by_documents(packed, q, k, v, segments, window=window) / scale

    assert_equal(evaluated(attend, case, jnp.float32), case, 3e-6)


def test_the_window_of_jaxs_attention_is_ours() -> None:
    """cuDNN is handed (window, 0): by JAX's own dense attention that is the window + 1 keys of our rule."""
    for window in (1, 7):
        case = Case(length=40, window=window)

        def attend(q: Any, k: Any, v: Any, segments: Any, window: Any) -> Any:
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, local_window_size=(window, 0), implementation="xla"
            )

        assert_equal(evaluated(attend, case, jnp.float32), case, 3e-6)


def test_packed_documents_are_handed_to_cudnn_as_it_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax._src.cudnn.fused_attention_stablehlo as private

    handed: dict[str, Any] = {}

    def dot_product_attention(query: Any, key: Any, value: Any, **named: Any) -> Any:
        handed.update(named, key=key, value=value)
        return query

    assert kernels._packing_problem() is None, "this JAX has the function that is called"
    monkeypatch.setattr(kernels, "_packing_problem", lambda: "JAX lacks it")
    with pytest.raises(UserError, match="JAX lacks it: set --attention=xla"):
        kernels._cudnn_packed(*[jnp.zeros(())] * 5, None)
    monkeypatch.setattr(kernels, "_packing_problem", lambda: None)
    monkeypatch.setattr(private, "dot_product_attention", dot_product_attention)
    (q, k, v, _), segments = arrays(Case(length=12, heads=4, kv_heads=2, borders=(5, 7)))
    runs = find_runs(jnp.asarray(segments), 4)
    kernels._cudnn_packed(*map(jnp.asarray, (q, k, v)), runs.start_BN, runs.length_BN, 6)
    assert handed["q_offsets"].tolist() == handed["kv_offsets"].tolist() == [[0, 5, 7, -1, -1]]
    assert handed["q_seqlen"].tolist() == handed["kv_seqlen"].tolist() == [[5, 2, 5, -1]]
    assert handed["sliding_window_length"] == 7 and handed["scale"] == 8**-0.5
    assert handed["mask_type"] is private.MaskType.PADDING_CAUSAL
    np.testing.assert_array_equal(handed["key"][:, :, 1], handed["key"][:, :, 0])
    np.testing.assert_array_equal(handed["value"][:, :, 2], jnp.asarray(v)[:, :, 1])


GPU = AttentionCase("gpu", jnp.bfloat16, 128, segments=True, window=3, capability=9.0)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("cudnn", {}, None),
        ("cudnn", {"capability": 8.0, "segments": False}, None),
        ("cudnn", {"head_dim": 256}, None),
        ("cudnn", {"platform": "cpu"}, "NVIDIA GPU"),
        ("cudnn", {"dtype": jnp.float32}, "not in float32"),
        ("cudnn", {"capability": 8.0}, "isolates documents only from compute capability 9.0"),
        ("cudnn", {"capability": 7.5}, "has 7.5"),
        ("cudnn", {"head_dim": 132}, "multiple of 8 up to 256, not 132"),
        ("cudnn", {"head_dim": 136, "capability": 8.0}, "up to 128, not 136"),
        ("cudnn", {"present": False}, "only be compiled on a machine with the GPU"),
        ("splash", {"platform": "tpu"}, None),
        ("splash", {"platform": "tpu", "dtype": jnp.float32}, None),
        ("splash", {"platform": "tpu", "dtype": jnp.float16}, "not in float16"),
        ("splash", {}, "for TPUs"),
        ("xla", {"platform": "cpu", "dtype": jnp.float32}, None),
    ],
)
def test_what_a_backend_cannot_do_is_named(name: str, changes: dict[str, Any], said: str | None) -> None:
    reason = unsupported(name, GPU._replace(**changes))
    assert reason is None if said is None else said in str(reason)


class Device(NamedTuple):
    platform: str
    compute_capability: str = "9.0"


def chosen(wanted: str, device: Any, monkeypatch: pytest.MonkeyPatch, *, here: bool = True) -> tuple[str, list[str]]:
    said: list[str] = []
    monkeypatch.setattr(jax, "devices", lambda: [device] if here else [])
    config = small.july2026(pattern=(GQA(heads=2, kv_heads=2, head_dim=8, window=3),))
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    name = backends.choose_attention(wanted, config, length=64, dtype=dtype, device=device, log=said.append)
    return name, said


def test_devices_choose_and_what_fails_on_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str | None] = [None]
    monkeypatch.setattr(backends, "differs", lambda *args: found[0])
    name, said = chosen("auto", Device("gpu", "gfx942"), monkeypatch)
    assert name == "xla" and "cudnn needs an NVIDIA GPU of compute capability 8.0" in said[0]
    assert chosen("auto", Device("cpu"), monkeypatch) == ("xla", [])
    assert chosen("auto", Device("tpu"), monkeypatch) == ("splash", [])
    assert chosen("auto", Device("gpu"), monkeypatch) == ("cudnn", [])
    assert chosen("xla", Device("gpu"), monkeypatch) == ("xla", [])
    name, said = chosen("auto", Device("gpu", "8.0"), monkeypatch)
    assert name == "xla" and "attention xla, not cudnn: cudnn isolates documents" in said[0]
    assert chosen("auto", Device("gpu"), monkeypatch, here=False)[0] == "xla_remat"
    assert chosen("auto", Device("tpu"), monkeypatch, here=False)[0] == "splash"
    name, said = chosen("splash", Device("cpu"), monkeypatch)
    assert name == "splash_interpreted" and "interpreter" in said[0]
    with pytest.raises(UserError, match=r"attention=splash cannot be used: .* platform gpu; set --attention=xla"):
        chosen("splash", Device("gpu"), monkeypatch)
    found[0] = "cudnn computes a wrong dq"
    assert chosen("auto", Device("gpu"), monkeypatch) == (
        "xla",
        ["attention xla, not cudnn: cudnn computes a wrong dq"],
    )
    with pytest.raises(UserError, match="attention=cudnn cannot be used: cudnn computes a wrong dq"):
        chosen("cudnn", Device("gpu"), monkeypatch)


def test_trying_finds_what_a_backend_does_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(backend: Any, windowed: bool = True) -> str | None:
        backends.differs.cache_clear()
        monkeypatch.setattr(backends, "BACKENDS", {"xla": kernels.xla, "tried": backend})
        return backends.differs("tried", 384, "bfloat16", True, 2, 1, 8, windowed)

    def broken(q: Any, k: Any, v: Any, segments: Any, window: Any) -> Any:
        raise RuntimeError("cuDNN is not detected.\nmore")

    assert attempt(kernels.xla) is None
    assert attempt(kernels.xla, windowed=False) is None
    assert "wrong attention" in str(attempt(lambda q, k, v, s, w: kernels.xla(q, k, v, s, w - 1)))
    assert "wrong attention" in str(attempt(lambda q, k, v, s, w: kernels.xla(q, k, v, None, w)))
    assert "wrong dq" in str(attempt(lambda q, k, v, s, w: kernels.xla(jax.lax.stop_gradient(q), k, v, s, w)))
    assert "wrong attention" in str(attempt(lambda q, k, v, s, w: kernels.xla(q, k, v, s, w) * jnp.nan))
    assert attempt(broken) == "tried fails on this device (cuDNN is not detected.)"
