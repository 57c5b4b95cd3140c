"""What a stage takes from the checkpoint that it starts from, and what it says about the rest."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from exports import model, tokenizer, write_run

from configs.recipe import imported
from jaxchat.errors import UserError
from jaxchat.evaluation.evaluate import Settings
from jaxchat.experiment import Experiment
from jaxchat.stages.scores import pretrained_text
from jaxchat.stages.stage import inherited, not_used


def later(tmp_path: Path, start: str, **changes: Any) -> Experiment:
    """An SFT experiment that starts from `start`."""
    e = dataclasses.replace(imported(model(**changes), 64, "sft"), directory=str(tmp_path), name="later")
    return dataclasses.replace(e, start_from=start)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_an_imported_model_has_no_pretraining_text(stage: str, tmp_path: Path) -> None:
    said: list[str] = []
    setup: Any = SimpleNamespace(experiment=later(tmp_path, write_run(tmp_path / "there", model(), stage=stage)))
    assert pretrained_text(setup, tokenizer(), 1, said.append) is None
    assert len(said) == 1 and said[0].endswith(
        f"so forgetting is not measured: {tmp_path}/there/run/{stage} was not pretrained here"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"softcap": None}, "model.softcap=None of this command is not used (15.0 there)"),
        ({"depth": 3, "softcap": 7.0}, "depth=3 and 2 more of this command is not used (2 there)"),
        ({"layer_loop": "scan", "remat": "dots"}, None),
    ],
)
def test_settings_of_the_model_that_the_start_replaces_are_named(
    changes: Any, said: str | None, tmp_path: Path
) -> None:
    start = write_run(tmp_path / "there", model())
    given = later(tmp_path, start, **changes)
    assert not_used(given, inherited(given)[0]) == (said and f"the model is that of {start}: {said}")


def test_equal_answers_are_not_counted_as_several() -> None:
    with pytest.raises(UserError, match="--samples=2 are equal at temperature 0: leave it out, or raise --temperature"):
        Settings("chat", samples=2)
    Settings("chat", samples=2, temperature=0.1)
