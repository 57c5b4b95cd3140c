"""Attention to a cache by the kernel that reads what is filled: beside float64, what it reads, where it is used."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small
from letters import Letters

from jaxchat import sharding
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.model import Transformer, backends, decoding_kernels
from jaxchat.model.cache import KVCache, slot_positions
from jaxchat.model.decoding_kernels import DECODING, block_slots
from jaxchat.model.kernels import AttentionCase, unsupported
from jaxchat.planning.chips import topology

os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
BLOCK, SIZE = 32, 8
INTERPRETED = ("filled_interpreted",)


class Case(NamedTuple):
    """A cache, and the newest position of each row: -1 for a row that is idle."""

    slots: int
    positions: tuple[int, ...]
    window: int | None = None
    heads: int = 4
    kv_heads: int = 2


CASES = (
    Case(4 * BLOCK, (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 4 * BLOCK - 1, -1)),
    Case(3 * BLOCK + 5, (3 * BLOCK + 4, 3 * BLOCK, 40, -1), heads=3, kv_heads=3),
    Case(4 * BLOCK, (2, BLOCK, 100), window=7, heads=4, kv_heads=1),
    Case(40 + 2, (0, 40, 41, 42, 43, 83, 84, 99, 1000, -1), window=40),
    Case(40 + 1 + 8, (20, 48, 49, 57, 97, 98, 500), window=40, heads=2),
    Case(16, (0, 15)),
)


@pytest.fixture(params=[SIZE, BLOCK], ids=["heads_by_lanes", "slots_by_lanes"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 32 slots; heads of 8 numbers fill the lanes, or are too short for them."""
    monkeypatch.setattr(decoding_kernels, "MOST_SLOTS", BLOCK)
    monkeypatch.setattr(decoding_kernels, "LANES", request.param)


def drawn(case: Case) -> tuple[np.ndarray, KVCache, np.ndarray]:
    """A query a row, a cache with something everywhere, and the positions as (B, 1)."""
    generator, rows = np.random.default_rng(5), len(case.positions)
    q = generator.standard_normal((rows, 1, case.heads, SIZE))
    k, v = generator.standard_normal((2, rows, case.kv_heads, case.slots, SIZE))
    return q, KVCache(k, v), np.array(case.positions, np.int32)[:, None]


def held(case: Case) -> np.ndarray:
    """The position in every slot, -1 for none, by writing them one after another."""
    slots = np.full((len(case.positions), case.slots), -1)
    for row, position in enumerate(case.positions):
        for p in range(position + 1):
            slots[row, p % case.slots] = p
    return slots


def expected(case: Case) -> np.ndarray:
    """In float64."""
    q, cache, at = drawn(case)
    k, v = (x.swapaxes(1, 2) for x in cache)
    return reference.attention(q, k, v, q_positions_BT=at, k_positions_BS=held(case), window=case.window)


@functools.cache
def compiled(name: str, lanes: int) -> Any:
    """Compiled anew for other lanes."""
    return jax.jit(lambda q, cache, at, window: DECODING[name](q, cache, at, at[:, 0] + 1, window), static_argnums=3)


def attended(name: str, case: Case, dtype: Any = jnp.float32, cache: KVCache | None = None) -> np.ndarray:
    q, whole, at = drawn(case)
    q, cache = jax.tree.map(lambda x: jnp.asarray(x, dtype), (q, whole if cache is None else cache))
    attend = compiled(name, decoding_kernels.LANES)
    return np.asarray(attend(q, cache, jnp.asarray(at), case.window), np.float64)


@pytest.mark.parametrize("name", INTERPRETED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_to_what_is_filled_equals_the_reference(case: Case, name: str, small_blocks: None) -> None:
    assert (block_slots(case.slots, 1, 16) < case.slots) == (case.slots > BLOCK), "several blocks are tried"
    found, wanted = attended(name, case), expected(case)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    active = np.array(case.positions) >= 0
    np.testing.assert_allclose(attended("xla", case)[active], wanted[active], rtol=0, atol=2e-6)
    np.testing.assert_array_equal(found[~active], 0)
    bfloat16 = attended(name, case, jnp.bfloat16)
    np.testing.assert_allclose(bfloat16, wanted, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", INTERPRETED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_was_never_written_does_not_reach_the_result(case: Case, name: str, small_blocks: None) -> None:
    _, cache, _ = drawn(case)
    written = (held(case) >= 0)[:, None, :, None]
    poisoned = KVCache(np.where(written, cache[0], np.nan), np.where(written, cache[1], np.inf))
    assert not written.all()
    found = attended(name, case, cache=poisoned)
    np.testing.assert_allclose(found, expected(case), rtol=0, atol=2e-6)


def fetched(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], int]:
    """The blocks of keys that each row of the grid fetches, one after another, and the slots of a block.

    A step that names the block of the step before fetches none.
    """
    made: list[Any] = []
    call = decoding_kernels.pl.pallas_call

    def pallas_call(kernel: Any, *, grid_spec: Any, **rest: Any) -> Any:
        made.append(grid_spec)
        return call(kernel, grid_spec=grid_spec, **rest)

    monkeypatch.setattr(decoding_kernels.pl, "pallas_call", pallas_call)
    compiled.cache_clear()
    attended("filled_interpreted", case)
    (grid,) = made
    (rows, steps), (_, keys, values) = grid.grid, grid.in_specs
    blocks: list[list[int]] = []
    for b in range(rows):
        named, of_values = (
            [tuple(map(int, spec.index_map(b, i, np.array(case.positions)))) for i in range(steps)]
            for spec in (keys, values)
        )
        assert named == of_values and all(row == b and rest.count(0) >= 2 for row, *rest in named)
        blocks.append([sum(named[i][1:]) for i in range(steps) if i == 0 or named[i] != named[i - 1]])
    return blocks, next(size for size in keys.block_shape[2:] if size != SIZE)


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=str)
def test_only_filled_blocks_are_fetched(case: Case, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, size = fetched(case, monkeypatch)
    for position, own in zip(case.positions, blocks, strict=True):
        filled = min(max(position + 1, 1), case.slots)  # An idle row's first block is named, for one has to be.
        assert own == list(range(-(-filled // size)))


def test_blocks_fit_a_core_and_tiles() -> None:
    assert block_slots(2048, 10 * 128 * 2, 16) == 352
    assert block_slots(2048, 4 * 128 * 2, 16) == 512
    assert block_slots(514, 6 * 128 * 2, 16) == 272
    assert block_slots(514, 6 * 64 * 2, 128) == 384
    assert block_slots(300, 64, 16) == 300
    for slots in (16, 17, 514, 1000, 2048, 8192):
        for bytes_ in (64, 2560, 8192, 1 << 20):
            for multiple in (16, 128):
                block = block_slots(slots, bytes_, multiple)
                assert block == slots or block % multiple == 0
                assert block <= 512 and (block * bytes_ <= 1 << 20 or block <= multiple)


@pytest.mark.parametrize("mesh", [(2, 1, 2), (1, 1, 2), (4, 1, 1)], ids=str)
def test_on_a_mesh_it_equals_one_device(mesh: tuple[int, int, int], small_blocks: None) -> None:
    case = Case(3 * BLOCK, (5, BLOCK, -1, 90))
    alone = attended("filled_interpreted", case)
    with jax.set_mesh(sharding.make_mesh(sharding.Mesh(*mesh), rows=4)):
        q, cache, at = jax.tree.map(jnp.asarray, drawn(case))
        jaxpr = jax.make_jaxpr(lambda *a: DECODING["filled_interpreted"](*a, at[:, 0] + 1, None))(q, cache, at)
        assert "shard_map" in str(jaxpr)
        np.testing.assert_allclose(attended("filled_interpreted", case), alone, rtol=0, atol=1e-7)


def test_several_tokens_a_row_are_dense() -> None:
    generator = np.random.default_rng(2)
    q, k = (jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in ((2, 3, 4, 8), (2, 2, 16, 8)))
    at = jnp.asarray([[4, 5, 6], [7, -1, -1]])
    found = [DECODING[name](q, KVCache(k, k), at, at.max(1) + 1, 3) for name in ("filled_interpreted", "xla")]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("length", [200, 64])
def test_an_engine_gives_the_same_tokens(length: int, small_blocks: None) -> None:
    """Rows of several lengths; the first model's windowed layer keeps a ring that goes around."""
    config = small.july2026(depth=2)
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    prompts = [(0, *np.random.default_rng(n).integers(1, 60, n).tolist()) for n in (2, 9, 45)]
    shape = EngineConfig(length=length, slots=4, steps=4, prefill_chunk=16, adapt=False)

    def answers(decoding: str) -> tuple[Any, Engine]:
        engine = Engine(Transformer(config), params, Letters(), shape, decoding=decoding)
        requests = [Request(ids, SamplingParams(0.0, max_tokens=6 + n)) for n, ids in enumerate(prompts)]
        return [answer.tokens for (answer,) in engine.generate(requests)], engine

    plain, dense = answers("auto")
    assert dense.transformer.decoding == "xla" and sum(map(len, plain)) > 10
    found, engine = answers("filled")
    assert engine.transformer.decoding == "filled_interpreted" and found == plain


class Device(NamedTuple):
    platform: str


def chosen(wanted: str, platform: str, monkeypatch: pytest.MonkeyPatch, *, here: bool = True) -> tuple[str, list[str]]:
    said: list[str] = []
    device = Device(platform)
    monkeypatch.setattr(jax, "devices", lambda: [device] if here else [])
    config = small.july2026()
    dtype = "float32" if platform == "cpu" else "bfloat16"
    return backends.choose_decoding(wanted, config, dtype=dtype, device=device, log=said.append), said


def test_devices_choose_and_what_fails_on_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str | None] = [None]
    monkeypatch.setattr(backends, "decodes_otherwise", lambda *args: found[0])
    assert chosen("auto", "cpu", monkeypatch) == ("xla", [])
    assert chosen("auto", "tpu", monkeypatch) == ("filled", [])
    assert chosen("xla", "tpu", monkeypatch) == ("xla", [])
    assert chosen("auto", "gpu", monkeypatch) == ("xla", [])
    name, said = chosen("filled", "cpu", monkeypatch)
    assert name == "filled_interpreted" and "interpreter" in said[0]
    with pytest.raises(UserError, match=r"decoding=filled cannot be used: .* platform gpu"):
        chosen("filled", "gpu", monkeypatch)
    with pytest.raises(UserError, match="unknown decoding backend 'other'; expected one of: auto, xla, filled"):
        chosen("other", "tpu", monkeypatch)
    found[0] = "filled is wrong"
    assert chosen("auto", "tpu", monkeypatch) == ("xla", ["decoding xla, not filled: filled is wrong"])
    assert chosen("auto", "tpu", monkeypatch, here=False) == ("filled", [])
    assert "not in float16" in str(unsupported("filled", AttentionCase("tpu", jnp.float16, 128, segments=False)))


@pytest.mark.parametrize("windowed", [False, True])
def test_trying_finds_what_a_kernel_does_wrong(windowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(backend: Any) -> str | None:
        backends.decodes_otherwise.cache_clear()
        monkeypatch.setattr(backends, "DECODING", {"xla": DECODING["xla"], "tried": backend})
        return backends.decodes_otherwise("tried", "bfloat16", 4, 2, 8, windowed)

    def changed(cut: int, later: int) -> Any:
        """One that sees another window, or a row as it is after other tokens."""

        def attend(q: Any, cache: Any, at: Any, length: Any, window: Any) -> Any:
            return DECODING["xla"](q, cache, at + later, length + later, window and window - cut)

        return attend

    def broken(*args: Any) -> Any:
        raise RuntimeError("Mosaic failed to compile TPU kernel\nmore")

    assert attempt(DECODING["filled_interpreted"]) is None
    assert attempt(changed(0, 0)) is None
    for backend in (changed(0, -1), changed(0, 1), *([changed(1, 0), changed(-1, 0)] if windowed else [])):
        assert "wrong attention to a cache" in str(attempt(backend))
    assert attempt(broken) == "tried fails on this device (Mosaic failed to compile TPU kernel)"


def test_it_is_tried_on_one_device_under_a_mesh_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process makes an engine alone, while the others wait: it must not ask for their devices."""
    seen = []

    def attend(*arguments: Any) -> Any:
        seen.append(jax.sharding.get_abstract_mesh().empty)
        return DECODING["xla"](*arguments)

    backends.decodes_otherwise.cache_clear()
    monkeypatch.setattr(backends, "DECODING", DECODING | {"filled": attend})
    monkeypatch.setattr(backends, "unsupported", lambda name, facts: None)
    with jax.set_mesh(sharding.make_mesh(sharding.Mesh(), rows=8)):
        device = jax.devices()[0]
        asked = type("Asked", (), {"platform": "tpu"})()
        monkeypatch.setattr(jax, "devices", lambda: [asked, device])
        assert backends.choose_decoding("auto", small.july2026(), dtype="float32", device=asked, log=print) == "filled"
    assert seen and all(seen)


@pytest.mark.parametrize(
    ("place", "head_dim", "slots", "window"),
    [("v5e-1", 128, 2048, None), ("v5e-1", 64, 514, 512), ("v6e-1", 64, 2048, None), ("v6e-1", 128, 514, 512)],
)
def test_tpus_that_are_not_here_take_the_kernel(place: str, head_dim: int, slots: int, window: int | None) -> None:
    """Its operands are read where they lie: nothing is copied for it."""
    pytest.importorskip("libtpu")
    program = compiled_for(place, "filled", head_dim, slots, window)
    assert "tpu_custom_call" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 8 * 10 * slots * head_dim * 2 / 10


def compiled_for(place: str, name: str, head_dim: int, slots: int, window: int | None) -> Any:
    device = jax.sharding.SingleDeviceSharding(topology(place).devices()[0])
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=device)  # noqa: E731
    q = array((8, 1, 10, head_dim), jnp.bfloat16)
    cache = KVCache(*[array((8, 10, slots, head_dim), jnp.bfloat16)] * 2)
    at = array((8, 1), jnp.int32)
    attend = jax.jit(lambda q, cache, at: DECODING[name](q, cache, at, at[:, 0] + 1, window))
    return attend.lower(q, cache, at).compile()


def test_slots_hold_what_the_reference_says() -> None:
    for case in CASES:
        length = jnp.asarray(case.positions, jnp.int32) + 1
        np.testing.assert_array_equal(slot_positions(length, case.slots), held(case))
