"""launch.plan: arithmetic that agrees with the model, and steps compiled for hardware that is not here."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import launch.plan
from configs import recipe
from jaxchat import command_line, compilation
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.model.counts import parameter_counts
from jaxchat.model.transformer import Transformer
from jaxchat.planning import ahead, plan
from jaxchat.planning.chips import CHIPS, GiB, topology

os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
SMALL = ["--config=configs/tiny.py:pretrain", "--depth=1", "--head_dim=8", "--data.row_length=64"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)


def test_the_cache_of_a_plan_is_that_of_the_engine() -> None:
    october = recipe.model(recipe.Dial(depth=20, family="october2025"))
    assert plan.cache_bytes(october, 1024) == {"GQA": 104_857_600, "total": 104_857_600}
    for model in (october, recipe.model(recipe.Dial(depth=4))):
        transformer = Transformer(model, jnp.bfloat16)
        layers = jax.eval_shape(lambda t=transformer: t.empty_cache(1, 2048, write=1)).layers
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
        windows = sum(layer.mixer.window is not None for layer in model.pattern) * model.repeats
        told = plan.cache_bytes(model, 2048)["total"]
        # A window's ring has room for what is written while its oldest key is still seen.
        assert told <= held <= told * (1 + 0.02 * windows)


def test_hours_and_dollars_follow_from_flops() -> None:
    e = command_line.load(["--config=configs/d20.py"])
    found = plan.derived(e, 0.5, None)
    assert found["parameters"] == parameter_counts(e.model) and found["parameters"]["total"] == 896_533_746
    assert found["tokens"] == 3320 * 1_048_576 and found["flops"] == found["tokens"] * found["flops_per_token"]
    one, eight = found["estimates"]["h100 x 1"], found["estimates"]["h100 x 8"]
    assert one["hours"] == pytest.approx(found["flops"] / (989e12 * 0.5) / 3600, rel=1e-4)
    assert eight["hours"] == pytest.approx(one["hours"] / 8, rel=1e-3)
    assert eight["dollars"] == pytest.approx(one["dollars"], rel=1e-2)
    assert plan.derived(e, 0.5, 1.0)["estimates"]["h100 x 1"]["dollars"] == pytest.approx(one["hours"], abs=0.01)


def test_the_state_of_a_plan_is_what_the_step_is_compiled_with() -> None:
    e = command_line.load(SMALL)
    setup = compilation.make_setup(e, print)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(setup.abstract))
    told = plan.state_bytes(e)
    scalars = 16  # Steps and counts of skipped ones.
    assert held - scalars <= told["parameters"] + told["optimizer"] <= held
    assert told["gradient"] == told["parameters"]


def test_every_stage_is_planned_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    told = launch.plan.main(["--config", "configs/tiny.py", "--mfu=0.2", "--dollars_per_chip_hour", "2"])
    stages = told["stages"]
    assert isinstance(stages, dict) and list(stages) == ["pretrain", "sft", "rl"]
    assert [stages[name]["tokens"] for name in stages] == [450 * 2048, 0, 20 * 256 * 48]
    text = capsys.readouterr().err
    assert "20% of peak" in text and "v5e x 8" in text and "cache of one sequence" in text
    (only,) = launch.plan.main(SMALL)["stages"]  # type: ignore[misc]
    assert only == "pretrain"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9-8", "unknown topology 'v9-8'"),
        ("v5e-7", "sizes of v5e are 1, 4, 8"),
        ("v5p-3", "sizes of v5p are 8, 16"),
        ("h100x0", "has no chips"),
        ("gpu", "unknown topology 'gpu'"),
    ],
)
def test_topologies_that_do_not_exist_are_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        topology(name)


def test_numbers_that_are_none_are_refused() -> None:
    for words in (["--mfu=0"], ["--mfu=many"], ["--dollars_per_chip_hour=-1"]):
        with pytest.raises(UserError, match=r"must be a positive number|takes FLOAT, not 'many'"):
            launch.plan.main([*SMALL, *words])


def test_names_tell_how_many_chips_there_are() -> None:
    assert [topology(name).chips for name in ("v5e-8", "v5p-16", "v4-8", "h100x8", "v6e-256")] == [8, 8, 4, 8, 256]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A compiler that needs so many GiB a row and layer, a quarter of them under full remat; and what it tried."""
    tried: list[tuple[int, int, str]] = []

    def needs(share: float) -> list[tuple[int, int, str]]:
        def compiled(e, topology, rows, remat, log):  # type: ignore[no-untyped-def]
            tried.append((e.depth, rows, remat))
            needed = (4.0 if remat == "full" else 16.0) * rows * e.depth * share * GiB
            needed /= topology.chips * e.mesh.fsdp
            return ahead.Fit(rows, remat, "xla", needed <= topology.chip.memory, needed, 0.0)

        monkeypatch.setattr(ahead, "compiled", compiled)
        tried.clear()
        return tried

    devices = {1: jax.devices()[:1], 8: jax.devices()[:8]}
    monkeypatch.setattr(type(topology("v5e-1")), "devices", lambda self: devices[self.chips])
    monkeypatch.setattr(ahead, "fit_decoding", lambda e, topology, log: {"fits": True})
    return needs


def experiment(depth: int = 1, **changes: object) -> Experiment:
    e = command_line.load([*SMALL, f"--depth={depth}", "--micro_rows=auto"])
    return dataclasses.replace(e, batch_tokens=64 * 64, **changes)


def test_the_largest_micro_batch_that_fits_is_found(compiler) -> None:  # type: ignore[no-untyped-def]
    place = topology("v5e-1")
    for share, rows, remat in ((1 / 256, 64, "none"), (1 / 16, 8, "none"), (1 / 2, 1, "none"), (1.5, 2, "full")):
        tried = compiler(share)
        found, _ = ahead.best(experiment(), place, print)
        assert found is not None and (found.micro_rows, found.remat) == (rows, remat)
        assert len(tried) == len(set(tried)) <= 8, "nothing is compiled twice"
    compiler(16)
    assert ahead.best(experiment(), place, print)[0] is None


def test_what_does_not_fit_is_refused_with_the_smallest_change_that_does(compiler) -> None:  # type: ignore[no-untyped-def]
    def refused(e: Experiment, place: str) -> str:
        with pytest.raises(UserError) as error:
            ahead.fit(e, topology(place), print, shallower=experiment)
        return str(error.value)

    compiler(1.5)
    assert "v5e-1 with micro_rows=16" in refused(experiment(micro_rows=16), "v5e-1")
    assert refused(experiment(micro_rows=16), "v5e-1").endswith("set --micro_rows=2 --model.remat=full")
    compiler(3)
    assert refused(experiment(2), "v5e-1").endswith(
        "set --depth=1 --micro_rows=1 --model.remat=full, or use more chips"
    )
    assert refused(experiment(2), "v5e-8").endswith("set --mesh.fsdp=8 --micro_rows=8 --model.remat=none")
    compiler(99)
    assert "no depth fits; use more chips" in refused(experiment(2), "v5e-1")
    compiler(1 / 16)
    assert ahead.fit(experiment(), topology("v5e-1"), print, shallower=experiment)["micro_rows"] == 8


@pytest.mark.parametrize("name", ["v5e-1", "v6e-8", "h100x2"])
def test_the_real_steps_are_compiled_for_hardware_that_is_not_here(name: str) -> None:
    place = topology(name)
    pytest.importorskip("libtpu" if place.chip.gpu is None else "jax_cuda12_plugin")
    rows = 8
    e = dataclasses.replace(command_line.load(SMALL), micro_rows=rows)
    found = ahead.fit(e, place, print, shallower=experiment)
    state = sum(plan.state_bytes(e)[part] for part in ("parameters", "optimizer"))
    assert found["fits"] and found["micro_rows"] == rows
    assert state < found["bytes_per_device"] < CHIPS[name.split("-")[0].split("x")[0]].memory / 10
    cache = plan.cache_bytes(e.model, e.data.row_length)["total"] * found["decoding"]["rows"] / place.chips
    assert found["decoding"]["fits"] and cache < found["decoding"]["bytes_per_device"] < 50 * cache
