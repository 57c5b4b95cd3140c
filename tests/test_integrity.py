"""Sizes, hashes and checksums: a change of any array is noticed, whatever its sharding."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_checkpoint import abstract, files_of, flip, read, same, state, write

from jaxchat import checkpoint, integrity
from jaxchat.errors import UserError


def test_large_files_are_verified_by_the_checksums_of_their_arrays(tmp_path, monkeypatch):
    """No file is read twice: every change of an array is noticed, wherever it lies."""
    monkeypatch.setattr(integrity, "LARGE", 0)
    directory = write(tmp_path / "stage", 2, 3)
    sizes = json.loads((directory / "sizes.json").read_text())
    assert all(digest is None for files in sizes.values() for _, digest in files.values())
    step, found, facts, _ = read(directory)
    assert (step, facts) == (3, {"tokens": 30}) and same(found, state(3))
    monkeypatch.setattr(integrity, "hashes", lambda paths: pytest.fail("read again") if paths else {})
    for part in ("params", "rest"):
        copy = Path(shutil.copytree(directory, tmp_path / part))
        files = (path for path in files_of(copy, 3) if path.is_relative_to(copy / "checkpoints/3" / part))
        flip(max(files, key=lambda path: path.stat().st_size))
        if part == "rest":
            assert same(checkpoint.load_params(copy, 3, abstract().params), state(3).params)
        else:
            with pytest.raises(UserError, match=r"checkpoint 3 in .* cannot be read"):
                checkpoint.load_params(copy, 3, abstract().params)
        step, found, _, said = read(copy)
        assert step == 2 and same(found, state(2)) and len(said) == 2, part


def test_a_checksum_knows_every_element_and_no_sharding():
    generator = np.random.default_rng(0)
    arrays = {
        "float32": generator.standard_normal((8, 3, 5)).astype(np.float32),
        "bfloat16": jnp.asarray(generator.standard_normal((8, 4)), jnp.bfloat16),
        "int32": generator.integers(0, 9, 8).astype(np.int32),
        "scalar": np.float32(3),
    }
    before = integrity.checksums(arrays)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    split = {
        name: jax.device_put(array, NamedSharding(mesh, PartitionSpec("x") if np.ndim(array) else PartitionSpec()))
        for name, array in arrays.items()
    }
    assert integrity.checksums(split) == before
    for place in [(0, 0, 0), (7, 2, 4), (3, 1, 2)]:
        for other in (np.nextafter(arrays["float32"][place], np.float32(9)), -arrays["float32"][place]):
            changed = arrays["float32"].copy()
            changed[place] = other
            assert integrity.checksums({**arrays, "float32": changed}) != before
    assert integrity.checksums({**arrays, "float32": arrays["float32"][::-1].copy()}) != before


def test_checkpoints_without_checksums_are_read_and_have_the_hash_of_their_files(tmp_path):
    """Those of earlier versions: sizes.json has the hash of every file."""
    copy = write(tmp_path / "stage", 2, 3)
    facts = copy / "checkpoints/3/facts/metadata"
    new = checkpoint.params_hash(copy, 3)
    facts.write_text(json.dumps({"tokens": 30}))
    integrity.record_files(copy / "checkpoints", [2, 3], fresh=3)
    assert read(copy)[:3:2] == (3, {"tokens": 30})
    old = checkpoint.params_hash(copy, 3)
    (copy / "sizes.json").unlink()
    assert checkpoint.params_hash(copy, 3) == old != new
