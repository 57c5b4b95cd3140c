"""Unstable training is recognised, reported once with a reason, and a calm run reports nothing."""

import dataclasses
import math
import random
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from configs import recipe
from jaxchat import optim
from jaxchat.stages.stability import BATCH, RATES, WINDOW, Stability


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
    reports = [report for record in records if (report := stability(record))]
    assert stability.finish() is None or len(stability.reports) == len(reports) + 1
    return stability, reports


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
    assert reports[0].startswith("step 101: the loss rose from") and RATES in reports[0]
    assert stability.unstable_steps >= 5


def test_batches_of_another_source_are_usual_once_they_have_been_seen():
    """A fine-tuning run with some pretraining text: one batch of eight has rows of it, and a higher loss."""
    records, noise = calm(), random.Random(1)
    for record in records[60:]:
        record["loss"] = 0.1 + noise.gauss(0, 0.004) + noise.uniform(0.15, 0.3) * (noise.random() < 1 / 8)
    stability, reports = follow(records)
    assert reports == [] and stability.unstable_steps == 0
    records[250]["loss"] = 1.0
    assert follow(records)[1][0].startswith("step 251: the loss rose")


def test_a_single_unusual_batch_is_told_from_rates_that_are_too_high():
    records = calm()
    records[150]["loss"] += 3
    stability, (report,) = follow(records)
    assert report.startswith("step 151: the loss rose") and BATCH in report
    assert stability.unstable_steps == 1


@pytest.mark.parametrize(("clip", "turned"), [(None, True), (1.0, False)])
def test_a_clip_limits_the_effect_of_such_a_batch(clip, turned):
    config = dataclasses.replace(recipe.optimizer(recipe.Dial(depth=2, steps=20, batch_tokens=4096)), clip=clip)
    tx = optim.make(config, {"w": SimpleNamespace(group="head")}, steps=20)
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)
    for gradient in (1.0, 1.0, 1.0, -1000.0):
        updates, state = tx.update({"w": jnp.full(2, gradient)}, state, params)
    assert bool((updates["w"] > 0).all()) == turned, "the update goes where the batches before point to"


def test_what_looked_like_a_batch_and_was_not_is_reported_again():
    records = calm()
    for number in (150, *range(170, 180)):
        records[number]["loss"] += 3
    reports = follow(records)[1]
    assert [BATCH in reports[0], RATES in reports[1], len(reports)] == [True, True, 2]


def test_a_loss_worse_than_guessing_is_blamed_on_the_rates_and_counts_after_the_first_steps():
    early, late, wild = calm(), calm(), calm()
    early[4]["loss"] = late[14]["loss"] = 7.2
    wild[4]["loss"] = 20.0
    assert follow(early)[0].unstable_steps == 0
    for records, step in ((late, 15), (wild, 5)):
        stability, (report,) = follow(records)
        assert report.startswith(f"step {step}: the loss") and "above ln(1024) = 6.931" in report and RATES in report
        assert stability.unstable_steps == 1


def test_an_exploding_gradient_is_reported_where_the_loss_is_no_likelihood_too():
    records = calm()
    records[150]["grad_norm"] = 60.0
    for vocab in (1024, None):
        _, (report,) = follow(records, vocab)
        assert report.startswith("step 151: the gradient norm 60 is") and BATCH in report
    records[150] |= {"loss": 9.0, "grad_norm": 1.0}
    assert follow(records, None)[1] == []


def test_episodes_far_apart_are_reported_each():
    records = calm()
    records[100]["loss"] += 3
    records[100 + WINDOW + 10]["loss"] += 3
    stability, reports = follow(records)
    assert [report.split(":")[0] for report in reports] == ["step 101", "step 161"]
    assert stability.unstable_steps == 2


def test_the_end_of_a_run_reports_what_began_in_its_last_steps_even_if_nothing_is_finite_any_more():
    records = calm()
    for record in records[-3:]:
        record |= {"loss": None, "grad_norm": math.inf}
    stability, reports = follow(records)
    assert reports == [] and stability.unstable_steps == 3
    (report,) = stability.reports
    assert report.startswith("step 298: loss or gradient are not finite") and RATES in report
