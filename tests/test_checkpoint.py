"""Checkpoints: what is read back is what was written, or there is a sentence about it."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import environment
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from configs import tiny
from jaxchat import checkpoint, integrity
from jaxchat.checkpoint import Checkpoints
from jaxchat.errors import UserError
from jaxchat.paths import split_step


class State(NamedTuple):
    step: Any
    params: Any
    optimizer: Any


def state(number):
    params = {"table": number + jnp.arange(1000, dtype=jnp.float32), "layers": ({"w": number * jnp.ones((8, 4))},)}
    return State(jnp.asarray(number), params, {"moment": number * jnp.arange(1000.0), "count": jnp.asarray(number)})


def abstract(sharding=None):
    placed = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), state(0))


def write(directory, *numbers, keep=2):
    checkpoints = Checkpoints(directory, keep=keep)
    for number in numbers:
        checkpoints.save(number, state(number), {"tokens": 10 * number})
    checkpoints.close()
    return directory


def read(directory, wanted=None):
    """The step, state and facts that a restore gives, and what it warned of."""
    said: list[str] = []
    checkpoints = Checkpoints(directory, keep=2)
    try:
        return *(checkpoints.restore(wanted or abstract(), said.append) or (None, None, None)), said
    finally:
        checkpoints.close()


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("written") / "stage", 1, 2, 3)


@pytest.fixture
def copy(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "stage"))


def files_of(directory, step):
    return [path for path in sorted((directory / "checkpoints" / str(step)).rglob("*")) if path.is_file()]


def test_the_newest_is_read_back_and_only_as_many_are_kept(written):
    step, found, facts, said = read(written)
    assert (step, facts, said) == (3, {"tokens": 30}, [])
    assert same(found, state(3))
    assert checkpoint.finished_steps(written) == [2, 3]


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    assert read(tmp_path) == (None, None, None, [])


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_a_checkpoint_is_read_on_any_number_of_devices(written, devices):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("x",))

    def split(leaf):
        spec = PartitionSpec("x") if leaf.ndim and leaf.shape[0] % devices == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    _, found, _, _ = read(written, jax.tree.map(split, state(0)))
    assert same(found, state(3))
    assert len(found.params["table"].sharding.device_set) == devices


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state(1), {})
    checkpoints.save(1, state(5), {})
    checkpoints.close()
    assert same(read(tmp_path)[1], state(1))


def flip(path):
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["truncated", "deleted", "one bit"])
def test_whichever_file_is_damaged_the_checkpoint_before_is_read(written, tmp_path, damage):
    for i, file in enumerate(files_of(written, 3)):
        directory = Path(shutil.copytree(written, tmp_path / str(i)))
        path = directory / file.relative_to(written)
        before = path.read_bytes()
        if damage == "deleted":
            path.unlink()
        elif damage == "one bit":
            flip(path)
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        step, found, facts, said = read(directory)
        assert (step, facts) == (2, {"tokens": 20}), path
        assert same(found, state(2)), path
        assert len(said) == 2 and said[0].startswith("warning: checkpoint 3 in ") and "\n" not in said[0]
        assert checkpoint.finished_steps(directory) == [2]
        kept = directory / "checkpoints-damaged/3"
        assert said[1] == f"damaged checkpoint 3 was moved to {kept}" and len(files_of(directory, 3)) == 0
        if damage == "one bit":
            flip(kept / path.relative_to(directory / "checkpoints/3"))
            assert (kept / path.relative_to(directory / "checkpoints/3")).read_bytes() == before


def test_after_falling_back_the_step_can_be_saved_again(copy):
    files_of(copy, 3)[0].unlink()
    checkpoints = Checkpoints(copy, keep=2)
    checkpoints.restore(abstract(), lambda text: None)
    checkpoints.save(3, state(7), {"tokens": 70})
    checkpoints.close()
    step, found, _, said = read(copy)
    assert (step, said) == (3, []) and same(found, state(7))
    files_of(copy, 3)[0].unlink()
    assert read(copy)[0] == 2
    assert sorted(path.name for path in (copy / "checkpoints-damaged").iterdir()) == ["3", "3-2"]


def test_sizes_that_an_earlier_version_wrote_are_enough(copy):
    sizes = json.loads((copy / "sizes.json").read_text())
    assert set(sizes) == {"2", "3"} and all(len(entry) == 2 for entry in sizes["3"].values())
    plain = {step: {name: size for name, (size, _) in files.items()} for step, files in sizes.items()}
    (copy / "sizes.json").write_text(json.dumps(plain))
    assert read(copy)[0] == 3
    path = files_of(copy, 3)[0]
    path.write_bytes(path.read_bytes() + b"x")
    assert read(copy)[0] == 2


def test_without_its_sizes_a_checkpoint_is_read_all_the_same(copy):
    (copy / "sizes.json").unlink()
    assert read(copy)[0] == 3
    (copy / "sizes.json").write_text("{")
    assert read(copy)[0] == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_array_that_is_cut_off_without_its_sizes_is_noticed(copy):
    (copy / "sizes.json").unlink()
    largest = max(files_of(copy, 3), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    step, found, _, said = read(copy)
    assert step == 2 and same(found, state(2)) and len(said) == 2


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_too_little_memory_is_not_taken_for_damage(copy, monkeypatch, error):
    def full(*args, **named):
        raise error

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", full)
    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "restore", full)
    before, checkpoints = sorted(path for path in copy.rglob("*")), Checkpoints(copy, keep=2)
    for read in (
        lambda: checkpoints.restore(abstract(), pytest.fail),
        lambda: checkpoint.load_params(copy, 3, abstract().params),
        lambda: checkpoint.load_rest(copy, 3, abstract(), "leave out --warm_optimizer"),
    ):
        with pytest.raises(UserError, match=r"^there is too little memory for checkpoint 3 in .*: use a larger device"):
            read()
    checkpoints.close()
    assert sorted(path for path in copy.rglob("*")) == before


def test_when_all_are_damaged_one_sentence_says_so(copy):
    for step in (2, 3):
        files_of(copy, step)[-1].unlink()
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* can be read: remove that directory to start"):
        read(copy)
    assert checkpoint.finished_steps(copy) == [2, 3]


def test_a_half_written_checkpoint_does_not_count(copy):
    shutil.copytree(copy / "checkpoints/3", copy / "checkpoints/4.orbax-checkpoint-tmp")
    assert read(copy)[0] == 3
    (copy / "experiment.json").write_text("{}")
    assert checkpoint.locate(str(copy)) == (copy, 3)


def test_parameters_are_read_alone(written):
    assert same(checkpoint.load_params(written, 2, abstract().params), state(2).params)


def test_parameters_are_read_though_the_optimizer_is_damaged_and_not_with_one_bit_changed(copy):
    for part in ("rest", "params"):
        files = (path for path in files_of(copy, 3) if path.is_relative_to(copy / "checkpoints/3" / part))
        flip(max(files, key=lambda path: path.stat().st_size))
        if part == "rest":
            assert same(checkpoint.load_params(copy, 3, abstract().params), state(3).params)
    with pytest.raises(UserError, match=r"checkpoint 3 in .* cannot be read: params/.* not match its recorded hash"):
        checkpoint.load_params(copy, 3, abstract().params)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, 1e25])
def test_parameters_that_are_not_finite_name_another_checkpoint(value, tmp_path):
    checkpoints = Checkpoints(tmp_path / "stage", keep=2)
    checkpoints.save(1, state(1), {})
    bad = state(2)
    bad.params["layers"][0]["w"] = bad.params["layers"][0]["w"].at[3, 1].set(value)
    checkpoints.save(2, bad, {})
    checkpoints.close()
    with pytest.raises(
        UserError,
        match=r"checkpoint 2 in .* parameters are not finite \(NaN, infinity or squares beyond float32\); try .*@1",
    ):
        checkpoint.load_params(tmp_path / "stage", 2, abstract().params)


def test_damaged_parameters_name_another_checkpoint(copy):
    files_of(copy, 3)[-1].unlink()
    with pytest.raises(UserError, match=r"checkpoint 3 in .* cannot be read: .*; try .*stage@2"):
        checkpoint.load_params(copy, 3, abstract().params)


def test_a_checkpoint_is_located_by_its_stage_and_step(copy):
    (copy / "experiment.json").write_text("{}")
    assert checkpoint.locate(str(copy)) == (copy, 3)
    assert checkpoint.locate(f"{copy}@2") == (copy, 2)
    with pytest.raises(UserError, match=r"no checkpoint @ in .*: there are 2, 3"):
        checkpoint.locate(f"{copy}@")
    for wrong in ("1", "x", "\u00b2"):
        with pytest.raises(UserError, match=rf"no checkpoint {wrong} in .*: there are 2, 3"):
            checkpoint.locate(f"{copy}@{wrong}")
    with pytest.raises(UserError, match=r"no checkpoint in .*: did you mean .*/stage\?"):
        checkpoint.locate(str(copy.parent))
    with pytest.raises(UserError, match=r"no checkpoint in .*nothing: train first"):
        checkpoint.locate(str(copy.parent / "nothing"))
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="has not reached its first one yet"):
        checkpoint.locate(str(copy))


FULL_DISK = """
import resource, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import numpy as np
import test_checkpoint as t
from jaxchat import launcher

def main(argv):
    checkpoints = t.Checkpoints(Path(argv[0]), keep=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))  # No file may be larger.
    checkpoints.save(4, t.state(4), {{}})
    checkpoints.wait()

launcher.run(main)
"""


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(copy):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK.format(tests=str(Path(__file__).parent)), str(copy)],
        env=environment() | {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    # TensorStore's threads may print of their own between and beside our sentence.
    assert "error: the checkpoint could not be written to " in done.stderr
    assert done.stderr.count("the last good one is step 3") == 1
    assert read(copy)[0] == 3


def test_sizes_that_cannot_be_written_are_one_sentence(tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError("No space left on device")

    monkeypatch.setattr(integrity, "record_files", full)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state(1), {})
    for act in (lambda: checkpoints.save(2, state(2), {}), checkpoints.check, checkpoints.close):
        with pytest.raises(UserError, match=r"could not be written to .*No space left.*; the last good one is step 1"):
            act()
    assert read(tmp_path)[0] == 1


def test_names_may_contain_an_at(copy, tmp_path):
    run = tmp_path / "a@b" / "sft"
    shutil.copytree(copy, run)
    (run / "experiment.json").write_text("{}")
    assert checkpoint.locate(str(run)) == (run, 3) and checkpoint.locate(f"{run}@2") == (run, 2)
    with pytest.raises(UserError, match=r"no checkpoint in .*a@b: did you mean .*a@b/sft\?"):
        checkpoint.locate(str(run.parent))
    e = dataclasses.replace(tiny.get_config("sft"), directory=str(tmp_path), name="a@b", start_from="pretrain@300")
    assert e.start == f"{tmp_path}/a@b/pretrain@300" and split_step(e.start)[0].endswith("a@b/pretrain")
    assert dataclasses.replace(e, start_from="x@y/sft").start == "x@y/sft"


@pytest.mark.parametrize("unknown", ["pwd.getpwuid", "grp.getgrgid"])
def test_files_of_a_user_without_a_name_are_read_and_written(copy, monkeypatch, unknown):
    def nobody(number):
        raise KeyError(f"{unknown}(): {number} not found")

    monkeypatch.setattr(unknown, nobody)
    with pytest.raises(KeyError):
        getattr(sys.modules[unknown[:3]], unknown[4:])(12345)
    (copy / "sizes.json").unlink()
    for step in (2, 3):  # Without it, Orbax asks for the time of the directory, and so for its owner.
        (copy / f"checkpoints/{step}/_CHECKPOINT_METADATA").unlink()
    assert read(copy)[0] == 3
    write(copy, 4)
    assert checkpoint.finished_steps(copy) == [3, 4]
    found = checkpoint.load_params(copy, 4, abstract().params)
    assert same(found, state(4).params)
    from etils import epath

    status, real = epath.Path(copy).stat(), copy.stat()
    assert (status.is_directory, status.mtime, status.mode) == (True, int(real.st_mtime), real.st_mode)


def test_arrays_written_one_at_a_time_are_read_as_those_of_a_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Orbax wants absolute paths.
    written = state(3)
    for name in ("save", "save_by_array"):
        checkpoints = Checkpoints(name, keep=1)
        getattr(checkpoints, name)(0, written, {"tokens": 1})
        checkpoints.close()
        found = Checkpoints(name, keep=1)
        number, read_back, facts = found.restore(abstract(), print)
        assert number == 0 and facts == {"tokens": 1}
        same(read_back, written)
        found.close()
