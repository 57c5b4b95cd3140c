"""The micro-batch that fits: chosen by the compiler's own numbers, or refused with what to set next."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import pytest

from jaxchat import command_line, compilation, devices, loading, processes, xla
from jaxchat.errors import UserError
from jaxchat.model import Float8
from jaxchat.rl.settings import RL
from jaxchat.sharding import Mesh


def setup(**changes):
    """What compile_step reads of a setup: 12 rows a batch, on one device unless `ways` says otherwise."""
    ways = changes.pop("ways", 1)
    experiment = command_line.load(
        ["--config=configs/tiny.py", "--batch_tokens=192", "--data.row_length=16", "--micro_rows=auto"]
    )
    shape = {"data": ways, "fsdp": 1, "expert": 1, "tensor": 1}
    mesh = SimpleNamespace(devices=SimpleNamespace(flat=jax.devices()), shape=shape)
    return SimpleNamespace(experiment=dataclasses.replace(experiment, **changes), mesh=mesh)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture
def memory(monkeypatch):
    """A compiler whose steps need 100 bytes a row, and a device of so many bytes."""

    def needs(rows):
        memory = SimpleNamespace(
            argument_size_in_bytes=0, output_size_in_bytes=0, alias_size_in_bytes=0, temp_size_in_bytes=100 * rows
        )
        return SimpleNamespace(memory_analysis=lambda: memory)

    def has(size):
        monkeypatch.setattr(devices, "memory_limit", lambda device: size / compilation.MEMORY_SHARE)
        monkeypatch.setattr(compilation, "state_bytes", lambda setup: 0)
        monkeypatch.setattr(
            compilation,
            "lower_step",
            lambda setup, rows: SimpleNamespace(compile=lambda compiler_options: needs(rows)),
        )

    return has


@pytest.mark.parametrize("size, rows", [(10**6, 12), (1200, 12), (1199, 6), (450, 4), (399, 3), (250, 2), (100, 1)])
def test_the_largest_micro_batch_that_fits_is_taken(memory, size, rows):
    memory(size)
    said: list[str] = []
    _, taken, _, tried = compilation.compile_step(setup(), said.append)
    said = [line for line in said if not line.startswith("compiling ")]
    assert taken == rows and list(tried.values()) == [100.0 * n for n in tried] and list(tried)[-1] == rows
    assert len(said) == (rows < 12), "what a failed try needed tells how many rows fit"
    assert not said or (said[0].startswith("micro_rows=12 ") and said[0].endswith(f"; trying {rows}"))


def test_the_mesh_divides_what_is_tried(memory):
    memory(350)
    assert compilation.compile_step(setup(ways=2), lambda text: None)[1] == 2


def test_when_nothing_fits_the_next_setting_is_named(memory):
    memory(99)
    with pytest.raises(UserError, match=r"does not fit in memory with micro_rows=1: set --model\.remat=full"):
        compilation.compile_step(setup(), lambda text: None)
    with pytest.raises(UserError, match=r"with micro_rows=4: set --model\.remat=full"):
        compilation.compile_step(setup(ways=4), lambda text: None)  # Which no smaller number divides over the mesh.
    full = dataclasses.replace(setup().experiment.model, remat="full")
    with pytest.raises(UserError, match=r"use more devices with --mesh\.fsdp"):
        compilation.compile_step(setup(model=full), lambda text: None)


def test_a_state_that_does_not_fit_is_refused_before_anything_is_compiled(memory, monkeypatch):
    memory(399)
    monkeypatch.setattr(compilation, "state_bytes", lambda setup: 400)
    monkeypatch.setattr(compilation, "lower_step", lambda setup, rows: pytest.fail("it was compiled"))
    with pytest.raises(UserError, match=r"state needs .* with --mesh\.fsdp, or take a smaller --depth"):
        compilation.compile_step(setup(), lambda text: None)


def test_a_micro_batch_that_was_asked_for_is_tried_whatever_it_needs(memory):
    memory(99)
    assert compilation.compile_step(setup(micro_rows=6), lambda text: None)[1] == 6


def out_of_memory(*args, **more):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.")


def test_running_out_of_memory_names_the_next_smaller_setting(monkeypatch, memory):
    memory(10**6)
    lowered = SimpleNamespace(compile=lambda compiler_options: Compiled())

    class Compiled:
        memory_analysis = staticmethod(lambda: None)
        __call__ = staticmethod(out_of_memory)

    monkeypatch.setattr(compilation, "lower_step", lambda setup, rows: lowered)
    step, *_ = compilation.compile_step(setup(micro_rows=6), lambda text: None)
    with pytest.raises(compilation.OutOfMemory, match=r"with micro_rows=6: set --micro_rows=4") as error:
        step(None, None)
    assert error.value.smaller == 4


def test_a_compiler_that_runs_out_of_memory_is_asked_for_less(monkeypatch, memory):
    memory(10**6)
    real = compilation.lower_step

    def lower(setup, rows):
        return SimpleNamespace(compile=out_of_memory) if rows > 3 else real(setup, rows)

    monkeypatch.setattr(compilation, "lower_step", lower)
    assert compilation.compile_step(setup(), lambda text: None)[1] == 3
    with pytest.raises(UserError, match=r"micro_rows=6: set --micro_rows=4"):
        compilation.compile_step(setup(micro_rows=6), lambda text: None)


def test_any_other_error_of_the_compiler_is_not_hidden(monkeypatch, memory):
    def broken(compiler_options):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    memory(10**6)
    monkeypatch.setattr(compilation, "lower_step", lambda setup, rows: SimpleNamespace(compile=broken))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        compilation.compile_step(setup(), lambda text: None)


def test_the_compilers_numbers_count_aliased_outputs_once():
    memory = SimpleNamespace(
        argument_size_in_bytes=10, output_size_in_bytes=9, alias_size_in_bytes=8, temp_size_in_bytes=100
    )
    assert compilation.step_bytes(SimpleNamespace(memory_analysis=lambda: memory)) == 111
    step = jax.jit(lambda x: x @ x + 1, donate_argnums=0).lower(jax.ShapeDtypeStruct((64, 64), "float32")).compile()
    assert 64 * 64 * 4 <= compilation.step_bytes(step) < math.inf


class Program:
    """Lowered, with what its compiler says of each try."""

    def __init__(self, *told):
        self.told, self.options = list(told), []

    def compile(self, compiler_options):
        self.options.append(compiler_options)
        told = self.told.pop(0)
        if isinstance(told, str):
            raise jax.errors.JaxRuntimeError(told)
        return told


def test_a_setting_that_the_compiler_does_not_know_is_left_out_aloud(monkeypatch):
    monkeypatch.setattr(xla, "options", lambda names, platform: {"old": True, "new": 1})
    monkeypatch.setattr(compilation, "step_bytes", lambda compiled: 5)
    program, said = Program("INVALID_ARGUMENT: No such compile option: 'new'", "compiled"), []
    program.told[1] = 7
    assert compilation.compile_lowered(program, setup(), said.append) == (7, 5)
    assert program.options == [{"old": True, "new": 1}, {"old": True}] and "no setting new" in said[0]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compilation.compile_lowered(Program("INTERNAL: broken"), setup(), said.append)
    with pytest.raises(jax.errors.JaxRuntimeError, match="'theirs'"):
        compilation.compile_lowered(Program("No such compile option: 'theirs'"), setup(), said.append)


def test_what_a_compiler_says_that_it_would_need_is_read():
    tpu = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 19.95G of 15.75G hbm."
    assert compilation.compile_lowered(Program(tpu), setup(), print) == (None, 19.95 * 2**30)
    assert compilation.compile_lowered(Program("RESOURCE_EXHAUSTED: no"), setup(), print) == (None, math.inf)


def test_settings_are_for_their_platforms():
    every = tuple(xla.SETTINGS)
    assert xla.options(every, "cpu") == {}
    for platform in ("tpu", "gpu"):
        assert all(name.startswith(("xla_enable", f"xla_{platform}")) for name in xla.options(every, platform))
    with pytest.raises(ValueError, match="xla: unknown setting 'fast'; expected one of: overlap"):
        dataclasses.replace(setup().experiment, xla=("fast",))


@pytest.mark.parametrize(
    ("kind", "capability", "slow"),
    [("TPU v5 lite", None, True), ("TPU7x", None, False), ("NVIDIA A100", "8.0", True), ("NVIDIA H100", "9.0", False)],
)
def test_products_in_float8_that_gain_nothing_are_told_of(kind, capability, slow):
    device, said = SimpleNamespace(device_kind=kind, compute_capability=capability), []
    plain = setup().experiment
    compilation.warn_of_float8(dataclasses.replace(plain, matmul=Float8()), device, said.append)
    assert bool(said) == slow and all(kind in line for line in said)
    compilation.warn_of_float8(plain, device, said.append)
    assert len(said) == slow


def test_the_reference_of_rl_takes_memory_beside_the_step(memory, monkeypatch):
    memory(600)
    params = {
        "w": jax.ShapeDtypeStruct((2, 25), "float32", sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    }

    def with_rl(kl):
        made = setup(rl=RL(prompts=3, samples=4, kl=kl))
        made.abstract = SimpleNamespace(params=params)
        return compilation.compile_step(made, lambda text: None).rows

    assert [with_rl(kl) for kl in (None, 0.0, 0.1)] == [6, 4, 4], "of 600 bytes, 200 are the reference's"


@pytest.mark.parametrize(
    ("dtype", "platform", "capability", "expected"),
    [
        ("auto", "cpu", None, "float32"),
        ("auto", "tpu", None, "bfloat16"),
        ("auto", "gpu", "9.0", "bfloat16"),
        ("auto", "gpu", "7.5", "float32"),
        ("float32", "gpu", "9.0", "float32"),
        ("bfloat16", "gpu", "7.5", "bfloat16"),
        ("bfloat16", "cpu", None, "bfloat16"),
    ],
)
def test_a_model_is_used_in_the_type_that_it_is_trained_in(monkeypatch, dtype, platform, capability, expected):
    device = SimpleNamespace(platform=platform, device_kind="a device", compute_capability=capability)
    said: list[str] = []
    e = dataclasses.replace(setup().experiment, dtype=dtype)
    assert devices.compute_dtype(e.dtype, device, said.append) == expected
    assert len(said) == (dtype == "auto" and capability == "7.5")
    monkeypatch.setattr(loading.jax, "devices", lambda: [device])
    assert loading.Loaded(None, 0, e, None).transformer().dtype == expected


def test_a_mesh_that_leaves_out_devices_of_a_group_is_refused_with_a_remedy_that_works(monkeypatch):
    experiment = setup(mesh=Mesh(data=2), micro_rows=8, batch_tokens=128).experiment
    make_setup = lambda e: compilation.make_setup(e, lambda _: None, jax.devices()[:4])  # noqa: E731
    assert make_setup(experiment).mesh.size == 2
    monkeypatch.setattr(processes, "joined_count", lambda: 2)
    with pytest.raises(UserError, match=r"2 of the 4 devices of 2 processes, .*: leave out --mesh\.data"):
        make_setup(experiment)
    assert make_setup(dataclasses.replace(experiment, mesh=Mesh())).mesh.size == 4
