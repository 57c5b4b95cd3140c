"""Problems solved together as one by one, and what cannot be judged counted."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import small
from letters import Letters

from jaxchat.decode.engine import Engine, Shape
from jaxchat.decode.sampling import SamplingParams
from jaxchat.evaluation.solve import pass_at_k, solve
from jaxchat.model import Transformer
from jaxchat.tasks import Problem, Score

TOKENIZER = Letters(user_start=50, user_end=51, assistant_start=52, assistant_end=53)
PROBLEMS = [Problem.ask("12"[i % 2] * (1 + i), "3", kind="ab"[i % 2]) for i in range(6)]
WARM = SamplingParams(1.0, max_tokens=6, seed=7)


class Judge:
    name, tools = "judge", ()

    def score(self, problem, text):
        return Score(len(text) % 3 == 0, len(text) % 3 < 2)


@pytest.fixture(scope="module")
def engine():
    config = small.july2026(depth=2)
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    return Engine(Transformer(config), params, TOKENIZER, Shape(length=48, slots=4, steps=4, adapt=False))


def test_all_together_answer_as_one_by_one(engine):
    together = solve(engine, Judge(), PROBLEMS, n=3, sampling=WARM)
    for i, problem in enumerate(PROBLEMS):
        alone = solve(engine, Judge(), [problem], n=3, sampling=dataclasses.replace(WARM, seed=WARM.seed + i))
        mine = [record for record in together.records if record.problem == i]
        assert [record.text for record in alone.records] == [record.text for record in mine]
    assert together.strict == sum(record.strict for record in together.records) / 18
    assert set(together.pass_at) == {1, 2} and together.pass_at[1] == pytest.approx((together.strict, together.lenient))
    assert together.pass_at[2][0] >= together.strict and set(together.by_kind) == {"a", "b"}
    assert sum(together.finish_reasons.values()) == 18


def test_a_base_model_goes_on_after_the_question(engine):
    asked = []
    fake = SimpleNamespace(
        tokenizer=TOKENIZER, generate=lambda requests: asked.extend(requests) or engine.generate(requests)
    )
    solve(fake, Judge(), PROBLEMS[:1], sampling=WARM, style="text")
    assert asked[0].prompt == [0, *TOKENIZER.encode("1 ")] and asked[0].sampling.stop == ("\n",)


def test_what_cannot_be_judged_or_asked_is_counted_and_wrong(engine):
    class Broken(Judge):
        def score(self, problem, text):
            if problem.kind == "b":
                raise RuntimeError("no idea")
            return None if len(problem.question) == 1 else Score(True, True)

    said = []
    long = Problem.ask("1" * 60, "3", kind="a")
    solved = solve(engine, Broken(), [*PROBLEMS, long], n=2, sampling=WARM, log=said.append)
    assert solved.errors == 2 * (3 + 1 + 1) and len(said) == 1 and "10 of 14 answers to judge" in said[0]
    assert solved.strict == 4 / 14


@pytest.mark.quick
@pytest.mark.parametrize("answers, right", [(1, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(answers, right):
    for k in range(1, answers + 1):
        chosen = list(itertools.combinations(range(answers), k))
        share = sum(any(i < right for i in pick) for pick in chosen) / len(chosen)
        assert pass_at_k(answers, right, k) == pytest.approx(share)
