"""The recipe's families and the law for the learning rates of small batches."""

import dataclasses
import hashlib
import itertools
import json
import math

import pytest

from configs import d4, d12, recipe, tiny
from configs.recipe import Dial
from jaxchat.data import tinyworld
from jaxchat.data.tinyworld import talk
from jaxchat.tasks import TASKS

RATES = ("muon", "head", "embed", "value_embeddings", "resid_scale", "x0_scale", "scalars")


def rates(optimizer):
    return {name: getattr(optimizer, name).learning_rate for name in RATES}


def test_small_depths_are_november_and_others_july():
    for depth, name in ((3, "november2026"), (11, "november2026"), (12, "july2026"), (32, "july2026")):
        assert recipe.family(Dial(depth)) is recipe.FAMILIES[name]
        assert recipe.family(Dial(depth, family="october2025")) is recipe.FAMILIES["october2025"]
    assert d12.get_config().optimizer == recipe.optimizer(dataclasses.replace(d12.DIAL, family="july2026"))


@pytest.mark.parametrize("batch", [2**18, 2**19, 2**20])
def test_the_law_is_nanochats_where_that_was_fitted(batch):
    assert recipe.rate_factor(batch) == math.sqrt(batch / 2**19)
    dial = Dial(12, family="november2026", batch_tokens=batch)
    assert recipe.optimizer(dial) == recipe.optimizer(dataclasses.replace(dial, family="july2026"))


def test_the_law_is_continuous_and_flatter_than_the_square_root_below():
    assert recipe.rate_factor(2**18 - 1) == pytest.approx(recipe.rate_factor(2**18), rel=1e-5)
    for large, small in itertools.pairwise(2**n for n in range(18, 9, -1)):
        assert recipe.rate_factor(small) > 0.9 * recipe.rate_factor(large)


def test_every_rate_of_a_small_batch_follows_the_law_but_not_that_of_july():
    small, smaller = (rates(recipe.optimizer(Dial(4, batch_tokens=tokens))) for tokens in (2**14, 2**11))
    ratio = recipe.rate_factor(2**11) / recipe.rate_factor(2**14)
    assert {name: smaller[name] / small[name] for name in RATES} == pytest.approx(dict.fromkeys(RATES, ratio))
    old = rates(recipe.optimizer(Dial(4, family="july2026", batch_tokens=2**11)))
    assert old["muon"] == pytest.approx(0.02 / 16) and smaller["muon"] > 10 * old["muon"]


@pytest.mark.parametrize("config", [tiny, d4])
def test_the_small_configurations_are_of_the_new_family(config):
    assert recipe.family(config.DIAL) is recipe.FAMILIES["november2026"]


def test_the_world_and_its_problems_are_what_scores_were_measured_on():
    """Texts, conversations and held-out problems, byte for byte; the hashes are those of commit 213a2aa."""
    parts = {
        "train": [tinyworld.document("train", i) for i in range(200)],
        "val": [tinyworld.document("val", i) for i in range(200)],
        "chat": [tinyworld.conversation("train", i) for i in range(200)],
        "problems": [(p.question, p.answer) for p in TASKS["arithmetic"]().problems("test")[:512]],
    }
    hashes = {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}
    assert hashes == {
        "train": "1a99e50caa1cb921",
        "val": "2a797f6c1befea67",
        "chat": "b19d2f8500b1d84c",
        "problems": "0a65998b9d8d0f06",
    }
    e = tiny.get_config("rl")
    assert (talk.TOOL_SHARE, e.tasks, e.eval_problems, e.eval_samples) == (0.4, ("arithmetic",), 512, 1)
