"""Unstable training is recognised, reported once with a reason, and a calm run reports nothing."""

import math
import random

import pytest

from jaxchat.stages.stability import WINDOW, Stability


def calm(steps=300, seed=0, vocab=1024):
    """A loss that falls as tiny's does, with noise, and gradient norms around one."""
    noise = random.Random(seed)
    return [
        {
            "step": step,
            "loss": 0.5 + (math.log(vocab) - 0.5) * math.exp(-step / 60) + noise.gauss(0, 0.05),
            "grad_norm": math.exp(noise.gauss(0, 0.3)),
        }
        for step in range(1, steps + 1)
    ]


def follow(records, vocab: int | None = 1024):
    stability = Stability(vocab)
    return stability, [report for record in records if (report := stability(record))]


@pytest.mark.parametrize("seed", range(5))
def test_a_calm_run_reports_nothing(seed):
    stability, reports = follow(calm(seed=seed))
    assert reports == stability.reports == [] and stability.unstable_steps == 0


def test_a_loss_that_rises_and_stays_is_reported_once_with_step_and_rates():
    records = calm()
    for record in records[100:]:
        record["loss"] += 4
        record["grad_norm"] *= 20
    stability, reports = follow(records)
    assert len(reports) == 1 and stability.reports == reports
    assert reports[0].startswith("step 101: the loss rose from") and "lower --optimizer.scale" in reports[0]
    assert stability.unstable_steps >= 5


def test_a_single_unusual_batch_is_told_from_rates_that_are_too_high():
    records = calm()
    records[150]["loss"] += 3
    stability, (report,) = follow(records)
    assert report.startswith("step 151: the loss rose") and "--optimizer.clip" in report
    assert stability.unstable_steps == 1


def test_a_loss_worse_than_guessing_counts_after_the_first_steps():
    early, late = calm(), calm()
    early[4]["loss"] = late[14]["loss"] = late[15]["loss"] = 7.2
    assert follow(early)[0].unstable_steps == 0
    stability, (report,) = follow(late)
    assert report.startswith("step 15: the loss 7.200 is above ln(1024) = 6.931") and stability.unstable_steps == 2


def test_an_exploding_gradient_is_reported_where_the_loss_is_no_likelihood_too():
    records = calm()
    records[150]["grad_norm"] = 60.0
    for vocab in (1024, None):
        _, (report,) = follow(records, vocab)
        assert report.startswith("step 151: the gradient norm 60 is") and "--optimizer.clip" in report
    records[150] |= {"loss": 9.0, "grad_norm": 1.0}
    assert follow(records, None)[1] == []


def test_episodes_far_apart_are_reported_each_and_steps_that_are_not_finite_are_left_out():
    records = calm()
    records[100]["loss"] += 3
    records[100 + WINDOW + 10]["loss"] += 3
    records[200] |= {"loss": None, "grad_norm": math.inf}
    stability, reports = follow(records)
    assert [report.split(":")[0] for report in reports] == ["step 101", "step 161"]
    assert stability.unstable_steps == 2
