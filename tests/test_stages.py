"""What a stage writes beside its checkpoints, and how it ends."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jaxchat import checkpoint, command_line, metrics, optim
from jaxchat.errors import UserError
from jaxchat.stages import checks, reporting, running


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    return command_line.load(
        ["--config=configs/tiny.py", "--steps=10", f"--directory={tmp_path}", "--prompts", "a", "b"]
    )


class Kept:
    """A writer that keeps its records."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


def test_the_learning_rate_that_is_told_is_the_one_that_was_applied(experiment):
    kept = Kept()
    log = reporting.StepLog(SimpleNamespace(experiment=experiment, mesh=SimpleNamespace(size=1)), None, [kept])
    skipped = [(0, 0), (1, 1), (2, 2), (0, 2), (0, 2)]  # In a row and in all, after each of five steps.
    for number, (in_row, in_all) in enumerate(skipped, 1):
        values = {"loss": 1.0, "grad_norm": 1.0, "skipped_in_row": in_row, "skipped": in_all}
        log(number, values, 0.5)
    factor = optim.learning_rate_factor(experiment.optimizer, experiment.steps)
    # The optimizer has taken no step while the second and third were skipped.
    assert [r["learning_rate_factor"] for r in kept.records] == [float(factor(jnp.int32(t))) for t in (0, 1, 1, 1, 2)]


def test_a_restart_on_another_device_reports_the_utilisation_of_the_steps_that_were_taken(experiment):
    def log_of(peak, writer):
        return reporting.StepLog(SimpleNamespace(experiment=experiment, mesh=SimpleNamespace(size=1)), peak, [writer])

    kept = Kept()
    log = log_of(1e12, kept)
    for number, seconds in enumerate((9.0, 0.5, 0.25, 1.0), 1):
        log(number, {"loss": 1.0, "grad_norm": 1.0, "skipped_in_row": 0, "skipped": 0}, seconds)
    again, unknown = log_of(1e9, Kept()), log_of(None, Kept())
    for other in (again, unknown):
        other.replay(kept.records)
        assert (other.mfu, other.tokens_per_second) == (log.mfu, log.tokens_per_second)
    assert log.mfu == round(kept.records[1]["mfu"], 4) > 0  # That of the median step, without the first.
    assert log_of(1e12, Kept()).mfu is None


def test_a_run_that_is_given_more_steps_says_what_becomes_of_its_learning_rates(experiment):
    again = dataclasses.replace(experiment, steps=40)
    assert running._other_schedule(again, 10) == ""
    checkpoint.write_experiment(experiment.stage_directory, experiment)
    assert running._other_schedule(experiment, 10) == ""
    factor = lambda steps: float(optim.learning_rate_factor(experiment.optimizer, steps)(jnp.int32(10)))  # noqa: E731
    changed = f"the factor of its learning rates is {factor(40):.3g} instead of {factor(10):.3g}"
    assert running._other_schedule(again, 10) == f" with 40 steps instead of 10: {changed}"
    assert factor(40) != factor(10)
    assert running._other_schedule(again, 0) == " with 40 steps instead of 10"


def test_an_unstable_run_says_so_once_and_counts_in_every_record(experiment):
    kept, said = Kept(), []
    setup = SimpleNamespace(experiment=experiment, mesh=SimpleNamespace(size=1))
    log = reporting.StepLog(setup, None, [kept], log=said.append)
    for number in range(1, 61):
        loss = 9.0 if number > 40 else 3.0 - number / 50 + number % 3 / 100
        log(number, {"loss": loss, "grad_norm": 1.0, "skipped_in_row": 0, "skipped": 0}, 0.5)
    assert len(said) == 1 and said[0].startswith("warning: step 41: the loss 9.000 is above ln(2048)")
    assert [record["unstable_steps"] for record in kept.records] == [max(0, number - 40) for number in range(1, 61)]
    assert log.stability.reports == [said[0].removeprefix("warning: ")]


def test_numbers_that_are_not_finite_are_null_in_metrics(tmp_path):
    lines = metrics.JsonLines(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "mfu": None, "tokens": 3})
    lines.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "grad_norm": None, "mfu": None, "tokens": 3}
    assert "NaN" not in text and "Infinity" not in text


def test_a_line_whose_step_is_no_number_is_removed(tmp_path):
    kept, *odd = '{"step":1}', '{"step":"one"}', '{"step":[1]}', "[1]", '{"ste'
    (tmp_path / "metrics.jsonl").write_text("\n".join([*odd, kept]))
    metrics.JsonLines(tmp_path / "metrics.jsonl", 1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == kept + "\n"


@pytest.mark.parametrize(
    "loss, val_bpb, said", [(math.nan, 2.0, "loss=nan"), (None, math.inf, "val_bpb=inf"), (2.0, math.nan, "val_bpb")]
)
def test_a_run_that_ends_without_a_number_says_so(experiment, loss, val_bpb, said):
    with pytest.raises(UserError, match=f"ended at step 10 with {said}.* under another --name"):
        checks.check_end(experiment, {"loss": loss, "val_bpb": val_bpb})
    checks.check_end(experiment, {"loss": None, "val_bpb": 2.0})
    checks.check_end(experiment, {"loss": 3.0, "val_bpb": 2.0})


def test_parameters_that_are_not_finite_are_never_trained():
    state = SimpleNamespace(params={"w": jnp.array([1.0, jnp.nan]), "v": jnp.ones(3)})
    with pytest.raises(UserError, match="the first parameters are not finite: correct"):
        checks.check_finite(state, "the first parameters", "correct")
    checks.check_finite(SimpleNamespace(params={"v": jnp.ones(3)}), "none", "")


def test_a_step_that_is_sampled_again_replaces_what_was_sampled_before(experiment, monkeypatch):
    answered = iter("abcdefgh")

    class Engine:
        def __init__(self, *args, mesh):
            pass

        def generate(self, asked):
            return [[SimpleNamespace(error=None, text=f" {next(answered)}\n\nand on")] for _ in asked]

    monkeypatch.setattr(reporting, "Engine", Engine)
    tokenizer = SimpleNamespace(bos=0, encode=lambda text: [1])
    experiment.stage_directory.mkdir(parents=True)
    setup, state = SimpleNamespace(experiment=experiment, transformer=None, mesh=None), SimpleNamespace(params=None)
    for number in (5, 10, 15, 10):  # Killed after 15, taken up again from 5.
        reporting.write_samples(setup, tokenizer, state, number=number, log=lambda text: None)
    text = (experiment.stage_directory / "samples.md").read_text()
    sections = {5: "ab", 10: "gh"}
    assert text == "".join(
        f"\n## Step {step}\n- **a** {one}  \n    \n  and on\n- **b** {two}  \n    \n  and on\n"
        for step, (one, two) in sections.items()
    )


@pytest.mark.quick
@pytest.mark.parametrize("correct", [{}, {"reward_correct": 0.5}])
def test_a_step_of_answers_is_told_also_where_none_could_be_judged(capsys, correct):
    record = {"step": 1, "loss": 0.0, "grad_norm": 0.0, "skipped": 0, "seconds": 3.0, "reward": 1.0, "reward_errors": 4}
    record |= {"answer_tokens": 7.0, "entropy": 1.0, "gap_max": 1e-6}
    record |= {"sample_seconds": 1.0, "score_seconds": 0.5, "train_seconds": 1.5}
    metrics.Terminal(2).write(record | correct)
    said = capsys.readouterr().err
    assert "reward 1.000" in said and "4 not rewarded" in said and ("correct 0.500" in said) == bool(correct)
    assert "1.0+0.5+1.5 s  0:03 left" in said
