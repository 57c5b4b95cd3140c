"""What a stage takes from the checkpoint that it starts from, and what it says about the rest."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from exports import model, tokenizer, write_run

from configs.recipe import imported
from jaxchat import checkpoint
from jaxchat.errors import UserError
from jaxchat.evaluation.evaluate import Settings
from jaxchat.experiment import Experiment
from jaxchat.export.convert import Imported
from jaxchat.model import Transformer
from jaxchat.rl.settings import RL
from jaxchat.stages.scores import pretrained_text
from jaxchat.stages.stage import inherited, locate_start, not_used, record_start, reference_params, started
from jaxchat.train import State


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


def test_settings_of_a_tokenizer_that_the_start_has_are_named(tmp_path: Path) -> None:
    start = write_run(tmp_path / "there", model())
    given = later(tmp_path, start)
    data = dataclasses.replace(given.data, tokenizer=dataclasses.replace(given.data.tokenizer, algorithm="unigram"))
    given = dataclasses.replace(given, data=data)
    said = f"the model is that of {start}: data.tokenizer.algorithm='unigram' of this command is not used ('bpe' there)"
    assert not_used(given, inherited(given)[0]) == said


def test_equal_answers_are_not_counted_as_several() -> None:
    with pytest.raises(UserError, match="--samples=2 are equal at temperature 0: leave it out, or raise --temperature"):
        Settings("chat", samples=2)
    Settings("chat", samples=2, temperature=0.1)


def begin(tmp_path: Path, start: str, **changes: Any) -> Experiment:
    """A stage that has started from `start`, as `running.build` leaves it before its first step."""
    e = dataclasses.replace(inherited(later(tmp_path, start))[0], **changes)
    tokenizer().save(e.run_directory / "tokenizer")
    checkpoint.write_experiment(e.stage_directory, e)
    record_start(e)
    return e


def test_without_warm_moments_a_stage_starts_from_another_optimizer_as_the_refusal_says(tmp_path: Path) -> None:
    e = dataclasses.replace(later(tmp_path, write_run(tmp_path / "there", model())), warm_optimizer=True)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = checkpoint.abstract_like((shapes := Transformer(model()).shapes()), jax.tree.map(lambda _: here, shapes))
    fresh = State(*[None] * len(State._fields))._replace(optimizer=jax.ShapeDtypeStruct((3,), float, sharding=here))
    setup: Any = SimpleNamespace(experiment=e, abstract=fresh._replace(params=abstract))
    with pytest.raises(UserError, match=r"cannot be restored .*: leave out --warm_optimizer$"):
        started(setup, fresh)
    setup.experiment = dataclasses.replace(e, warm_optimizer=False)
    assert started(setup, fresh)._replace(params=None) == fresh


def train_further(start: str, step: int, scale: float) -> Any:
    """Another checkpoint of the stage `start` instead of those that it has (`--keep=1`); returns its parameters."""
    params = small.parameters(model(), scale=scale)
    for old in (Path(start) / "checkpoints").iterdir():
        shutil.rmtree(old)
    checkpoints = checkpoint.Checkpoints(start, keep=1)
    checkpoints.save(step, Imported(jax.tree.map(jnp.asarray, params), np.zeros((), np.int32)), {})
    checkpoints.close()
    return params


def test_a_stage_that_has_started_knows_its_start_whatever_becomes_of_that(tmp_path: Path) -> None:
    start = write_run(tmp_path / "there", model())
    e = begin(tmp_path, start)
    assert locate_start(e) == (Path(start), 0)
    train_further(start, 7, 0.2)
    with pytest.raises(UserError, match=r"started from .*@0, which is gone: remove .*later/sft to start again, or"):
        locate_start(e)
    assert locate_start(later(tmp_path / "other", start)) == (Path(start), 7), (
        "a stage that starts now takes the newest"
    )
    train_further(start, 0, 0.2)
    with pytest.raises(UserError, match=r"@0, which is another now"):
        locate_start(e)
    shutil.rmtree(start)
    resumed, its_tokenizer = inherited(later(tmp_path, start))
    assert resumed == e and its_tokenizer is not None and its_tokenizer.hash == tokenizer().hash
    with pytest.raises(UserError, match="no checkpoint in"):
        inherited(later(tmp_path / "other", start))


def test_a_start_that_is_named_from_home_or_has_an_at_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    start = write_run(tmp_path / "a@b", model())
    for number, name in enumerate((start, f"{start}@0", "~/a@b/run/sft", "~/a@b/run/sft@0")):
        assert locate_start(begin(tmp_path / str(number), name)) == (Path(start), 0)


def test_the_kl_reference_is_that_of_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = write_run(tmp_path / "there", model())
    abstract = checkpoint.abstract_like(
        (shapes := Transformer(model()).shapes()),
        jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes),
    )
    said: list[str] = []
    for linked in (True, False):
        if not linked:
            monkeypatch.setattr(checkpoint.os, "link", _refused)
        e = begin(tmp_path / str(linked), start, rl=RL(kl=0.1))
        before = reference_params(e, abstract, said.append)
        newer = train_further(start, 7 + linked, 0.2 if linked else 0.1)
        after = reference_params(e, abstract, said.append)
        jax.tree.map(np.testing.assert_array_equal, before, after)
        assert any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(newer)))
    assert set(said[:2]) == {f"KL reference: {tmp_path}/True/later/sft/reference@0"}
    damaged = next(
        path for path in (e.stage_directory / "reference").rglob("*") if path.is_file() and "params" in str(path)
    )
    damaged.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        reference_params(e, abstract, said.append)


def _refused(*_: Any) -> None:
    raise OSError("no links here")
