"""The experiment that a run directory holds: another, damaged, replaced."""

import dataclasses
import json
import os
from dataclasses import dataclass

import pytest

from jaxchat import checkpoint
from jaxchat.errors import UserError


@dataclass(frozen=True)
class Run:
    steps: int = 10
    seed: int = 0
    mesh: "Mesh" = dataclasses.field(default_factory=lambda: Mesh())


@dataclass(frozen=True)
class Mesh:
    data: int = 0


def test_another_experiment_is_refused_by_name(tmp_path):
    checkpoint.check_same(tmp_path, Run(), ("steps", "mesh."))
    checkpoint.write_experiment(tmp_path, Run())
    checkpoint.check_same(tmp_path, Run(steps=20, mesh=Mesh(4)), ("steps", "mesh."))
    with pytest.raises(UserError, match=r"seed was 0 and is now 1; give this one its own --name"):
        checkpoint.check_same(tmp_path, Run(seed=1), ("steps", "mesh."))
    with pytest.raises(UserError, match=r"steps was 10 and is now 20 and 1 more field;"):
        checkpoint.check_same(tmp_path, Run(20, 1), ("mesh.",))


def test_a_damaged_experiment_is_one_sentence(tmp_path):
    for content, reason in (('{"type": "Run", "st', "Unterminated"), ("", "it is empty"), ("{}\0", "Extra data")):
        (tmp_path / "experiment.json").write_text(content)
        with pytest.raises(UserError, match=rf"experiment\.json cannot be read \({reason}.*: restore it, or remove"):
            checkpoint.read_experiment(tmp_path, Run)


def test_an_experiment_is_replaced_whole(tmp_path):
    checkpoint.write_experiment(tmp_path, Run())
    checkpoint.write_experiment(tmp_path, Run(steps=11))
    assert checkpoint.read_experiment(tmp_path, Run) == Run(steps=11)
    assert os.listdir(tmp_path) == ["experiment.json"]
    assert json.loads((tmp_path / "experiment.json").read_text())["type"] == "Run"
