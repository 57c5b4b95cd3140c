"""Meshes: the same training on one device and on eight, and a state that is never whole on one of them."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from jax.sharding import PartitionSpec
from test_train import cut, keep_gradient

from configs import recipe
from jaxchat import devices, machine, optim, sharding
from jaxchat.model import GQA, Model, Transformer, ValueEmbedding
from jaxchat.objectives.likelihood import Likelihood
from jaxchat.train import init_state, state_placements, train_step

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2)}
ROWS, LENGTH, STEPS = 8, 12, 5


def model() -> Model:
    """Eight heads and eight kv heads, so that every mesh divides it."""
    plain = {"heads": 8, "kv_heads": 8, "head_dim": 4, "qk_scale": 1.2}
    pattern = (GQA(window=3, **plain), GQA(value_embedding=ValueEmbedding(gate_channels=4), **plain))
    return small.july2026(pattern=pattern, layer_loop="scan")


def mesh_of(name: str) -> jax.sharding.Mesh:
    """A mesh by name; "one" is one device."""
    return sharding.make_mesh(sharding.Mesh(*MESHES.get(name, (1, 1, 1))), rows=ROWS)


def muon_adamw(transformer: Transformer, dtype: Any) -> optax.GradientTransformation:
    dial = recipe.Dial(depth=4, steps=20, batch_tokens=4096)
    return optim.make(recipe.optimizer(dial), transformer.specs(), steps=20, dtype=dtype)


def train(name: str, transformer: Transformer, tx: Any, steps: int, micro: int) -> tuple[Any, list[float]]:
    """The state after `steps` of the real step on a mesh, its parameters placed as training places them, and losses."""
    mesh, wide = mesh_of(name), transformer.dtype
    batch = cut(small.batch(ROWS, LENGTH, transformer.config.vocab, wide), micro)
    start = jax.eval_shape(lambda: init_state(transformer, tx, jax.random.key(0)))
    placed = state_placements(mesh, start, transformer.axes())
    params = small.parameters(transformer.config, wide, scale=0.1)
    zero = np.zeros((), np.int32)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, placed.params)
        optimizer = jax.jit(tx.init, out_shardings=placed.optimizer)(params)
        state = start._replace(step=zero, params=params, optimizer=optimizer, skipped_in_row=zero, skipped=zero)
        step = functools.partial(train_step, loss=functools.partial(Likelihood(), transformer), tx=tx)
        step = jax.jit(step, out_shardings=(placed, None), donate_argnums=0)
        state, losses = jax.device_put(state, placed), []
        for _ in range(steps):
            state, metrics = step(state, sharding.put_batch(mesh, batch))
            losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def losses(name: str, dtype: Any) -> list[float]:
    transformer = Transformer(model())
    return train(name, transformer, muon_adamw(transformer, dtype), STEPS, micro=1)[1]


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_train_as_one_does(name: str) -> None:
    one = losses("one", jnp.float32)
    assert one[-1] < 0.99 * one[0], "training does not change the loss"
    np.testing.assert_allclose(losses(name, jnp.float32), one, rtol=1e-5)


def test_eight_devices_train_as_one_does_with_bfloat16_newton_schulz() -> None:
    one = losses("one", jnp.bfloat16)
    assert one != losses("one", jnp.float32)
    np.testing.assert_allclose(losses("all", jnp.bfloat16), one, rtol=1e-3)


@functools.cache
def gradient(name: str, micro: int = 1) -> Any:
    with jax.enable_x64(True):
        state, _ = train(name, Transformer(model(), jnp.float64), keep_gradient(), 1, micro)
        return jax.tree.map(np.asarray, state.optimizer)


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_give_the_gradient_of_one(name: str) -> None:
    small.assert_close(gradient(name), gradient("one"), 1e-10)


def test_micro_batches_on_eight_devices_give_the_gradient_of_one() -> None:
    small.assert_close(gradient("all", micro=2), gradient("one"), 1e-10)


@functools.cache
def start(name: str) -> tuple[Any, Any, Any]:
    """The compiled program that makes a fresh state on a mesh, its placements, and the state's shapes."""
    transformer = Transformer(model())
    tx, mesh = muon_adamw(transformer, jnp.float32), mesh_of(name)
    make = functools.partial(init_state, transformer, tx)
    shapes = jax.eval_shape(make, jax.random.key(0))
    placed = state_placements(mesh, shapes, transformer.axes())
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=placed).lower(jax.random.key(0)).compile(), placed, shapes


@functools.cache
def local() -> Any:
    """A fresh state on one device."""
    transformer = Transformer(model())
    return jax.jit(functools.partial(init_state, transformer, muon_adamw(transformer, jnp.float32)))(jax.random.key(7))


@pytest.mark.parametrize("name", MESHES)
def test_a_state_made_sharded_equals_the_local_one_bit_for_bit(name: str) -> None:
    compiled, placed, _ = start(name)
    made = compiled(jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, made, local())
    jax.tree.map(lambda leaf, wanted: leaf.sharding.is_equivalent_to(wanted, leaf.ndim) or pytest.fail(), made, placed)


@pytest.mark.parametrize("name", ["fsdp", "tensor", "all"])
def test_making_a_state_holds_no_whole_copy_of_a_split_parameter(name: str) -> None:
    compiled, placed, shapes = start(name)
    leaves = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True))
    parts = [(leaf.size, int(np.prod(where.shard_shape(leaf.shape)))) for leaf, where in leaves]
    largest = max(part for _, part in parts)
    found = re.findall(r"\b[a-z]\d+\[([\d,]+)\]", compiled.as_text())
    made = max(int(np.prod([int(n) for n in shape.split(",")])) for shape in found)
    assert made <= 2 * largest, "random bits come in pairs; anything larger is more than one device's part"
    assert 2 * largest < max(whole for whole, _ in parts)


def test_optimizer_moments_lie_where_their_parameters_do() -> None:
    _, placed, shapes = start("all")
    by_shape = {leaf.shape: where.spec for leaf, where in zip(*map(jax.tree.leaves, (shapes.params, placed.params)))}
    moments = list(zip(*map(jax.tree.leaves, (shapes.optimizer, placed.optimizer)), strict=True))
    split = [leaf for leaf, where in moments if leaf.ndim > 1 and leaf.shape in by_shape and any(where.spec)]
    assert len(split) > 10
    for leaf in split:
        assert any(by_shape[leaf.shape])
    large = [leaf for leaf, where in moments if leaf.size > 500 and not any(where.spec)]
    assert not large, "a moment of a parameter's size is kept whole on every device"


def test_two_axes_of_a_parameter_on_one_mesh_axis_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="axes heads and hidden are both placed on mesh axis tensor"):
        sharding.spec(("embed", "heads", "hidden"))
    with pytest.raises(ValueError, match="axes batch and embed are both placed on mesh axis fsdp"):
        sharding.spec(("batch", "embed"))
    assert sharding.spec(("batch", None, "heads")) == PartitionSpec(("data", "fsdp", "expert"), None, "tensor")


@pytest.mark.parametrize(
    ("mesh", "rows", "message"),
    [
        ((16, 1, 1), 16, "data=16 fsdp=1 tensor=1 expert=1 does not fit 8 devices"),
        ((0, 3, 1), 6, "data=2 fsdp=3 tensor=1 expert=1 does not fit 8 devices"),
        (
            (4, 2, 1),
            12,
            "12 rows does not divide over data=4 x fsdp=2 x expert=1: set micro_rows and batch_tokens to a",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_both_numbers(
    mesh: tuple[int, int, int], rows: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sharding.Mesh(*mesh), rows=rows)


def test_the_data_axis_takes_the_devices_that_are_left() -> None:
    assert dict(sharding.make_mesh(sharding.Mesh(0, 2, 2), rows=8).shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
        "expert": 1,
    }


def test_a_parameter_that_a_mesh_does_not_divide_is_refused_by_name() -> None:
    transformer = Transformer(small.july2026())
    with pytest.raises(
        ValueError, match=r"kv_heads=2 of layers\.mixer\.\w is not a multiple of tensor=8: choose another --mesh.tensor"
    ):
        sharding.placements(mesh_of("tensor"), transformer.shapes(), transformer.axes())


@pytest.mark.parametrize(
    ("rows", "cores", "devices"), [(8, 2, 2), (8, 64, 8), (6, 4, 3), (7, 4, 1), (7, 7, 7), (1, 8, 1)]
)
def test_host_devices_divide_the_rows(rows: int, cores: int, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "cores", lambda: cores)
    assert sharding.host_devices(rows) == devices


LIMITS: list[tuple[str, dict[str, str], int, int | None]] = [
    ("0::/\n", {}, 8, None),
    ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, 8, None),
    ("0::/\n", {"cpu.max": "250000 100000\n", "memory.max": "1048576\n"}, 3, 1 << 20),
    ("0::/\n", {"cpu.max": "5000 100000\n"}, 1, None),
    ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000", "a/memory.max": "4096"}, 2, 4096),
    ("0::/a/b\n", {"memory.max": "9000", "a/memory.max": "4096", "a/b/memory.max": "5000"}, 8, 4096),
    ("4:memory:/a\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 8, None),
    ("4:memory:/a\n", {"memory/memory.limit_in_bytes": "4096\n"}, 8, 4096),
    ("4:cpu:/a\n", {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3, None),
    ("4:cpu:/a\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8, None),
    ("", {"memory.max": "4096"}, 8, 4096),
]


@pytest.mark.parametrize(("own", "files", "cores", "memory"), LIMITS)
def test_the_limits_of_a_container_hold(
    own: str, files: dict[str, str], cores: int, memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN", tmp_path / "self")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "self").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cores() == cores
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.memory() == (memory or whole)
    assert devices.memory_limit(jax.devices()[0]) == (memory or whole) // 8


def test_a_dimension_that_the_mesh_does_not_divide_stays_whole() -> None:
    def asked(rows: int) -> PartitionSpec:
        jaxpr = jax.make_jaxpr(lambda x: sharding.constrain(x, ("batch", "hidden")))(jnp.ones((rows, 6)))
        return jaxpr.eqns[0].params["sharding"].spec

    with jax.set_mesh(mesh_of("all")):
        assert asked(4) == PartitionSpec(("data", "fsdp", "expert"), "tensor")
        assert asked(1) == PartitionSpec(None, "tensor")


def test_a_batch_is_split_by_rows() -> None:
    mesh, batch = mesh_of("all"), cut(small.batch(ROWS, LENGTH, 60), 2)
    placed = sharding.put_batch(mesh, batch)
    for name, column in batch.items():
        assert placed[name].sharding.shard_shape(column.shape) == (2, 1, LENGTH)
        np.testing.assert_array_equal(placed[name], column)
