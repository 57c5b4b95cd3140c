"""Runs of earlier versions are read."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs import recipe
from jaxchat import checkpoint
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.upgrades import FORMAT, UPGRADES

pytestmark = pytest.mark.quick


def experiment(**fields: object) -> Experiment:
    dial = recipe.Dial(depth=2, steps=10, batch_tokens=64, vocab=128, row_length=32, head_dim=32)
    return recipe.pretrain(dial, name="old", train=("tinyworld:train",), **fields)


def test_every_format_has_its_upgrade() -> None:
    assert list(UPGRADES) == list(range(1, FORMAT))


def test_a_run_of_format_1_is_read_as_the_same_experiment(tmp_path: Path) -> None:
    e = experiment()
    checkpoint.write_experiment(tmp_path, e)
    path = tmp_path / "experiment.json"
    value = json.loads(path.read_text())
    assert value.pop("format") == FORMAT
    layers = value["model"].pop("pattern")
    for layer in layers:
        layer["mixer"]["rope"] = layer["mixer"].pop("positions")
    value["model"] |= {"pattern": [layer["mixer"] for layer in layers], "mlp": layers[0]["mlp"]}
    del value["optimizer"]["steps_exponent"]  # A field that came later has its default.
    path.write_text(json.dumps(value))
    optimizer = dataclasses.replace(e.optimizer, steps_exponent=0.0)
    assert checkpoint.read_experiment(tmp_path, Experiment) == dataclasses.replace(e, optimizer=optimizer)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    checkpoint.write_experiment(tmp_path, experiment())
    path = tmp_path / "experiment.json"
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(UserError, match="has format 99, but this version reads up to"):
        checkpoint.read_experiment(tmp_path, Experiment)
