"""Problems solved together as one by one, and what cannot be judged counted."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import small
from letters import Letters

from jaxchat.decode.beam import beam_search
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Completion, Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
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
    return Engine(Transformer(config), params, TOKENIZER, EngineConfig(length=48, slots=4, steps=4, adapt=False))


def test_all_together_answer_as_one_by_one(engine):
    together = solve(engine, Judge(), PROBLEMS, n=3, sampling=WARM)
    for i, problem in enumerate(PROBLEMS):
        alone = solve(engine, Judge(), [problem], n=3, sampling=dataclasses.replace(WARM, seed=WARM.seed + i))
        assert list(alone.records[0]) == list(together.records[i])
    every = [record for own in together.records for record in own]
    shares = sum(record.strict for record in every) / 18, sum(record.lenient for record in every) / 18
    assert set(together.pass_at) == {1, 2} and together.pass_at[1] == pytest.approx(shares)
    assert together.pass_at[2][0] >= shares[0] and len(every) == 18


def test_a_base_model_goes_on_after_the_question():
    asked = []

    def generate(requests):
        asked.extend(requests)
        return [[Completion(" Three", (1, 2), (), (), (), finish_reason="stop")]]

    fake = SimpleNamespace(tokenizer=TOKENIZER, generate=generate)
    solved = solve(fake, Judge(), PROBLEMS[:1], sampling=WARM, style="text")
    assert asked[0].prompt == [0, *TOKENIZER.encode("1")] and asked[0].sampling.stop == ("\n",)
    assert solved.records[0][0].text == "Three", "the space between question and answer is neither's"


@pytest.mark.parametrize("sampling", [WARM, SamplingParams(0.0), SamplingParams(1.0, top_p=0.9)])
def test_a_model_without_finite_probabilities_gets_no_score(engine, sampling):
    params = small.parameters(small.july2026(depth=2))
    params["ends"]["head"][:, 5] = jnp.nan
    broken = Engine(engine.transformer, jax.tree.map(jnp.asarray, params), TOKENIZER, engine.shape)
    with pytest.raises(UserError, match="probabilities are not finite"):
        solve(broken, Judge(), PROBLEMS[:2], n=2, sampling=dataclasses.replace(sampling, max_tokens=2))
    with pytest.raises(UserError, match="probabilities are not finite"):
        broken.forward([1, 2])
    with pytest.raises(UserError, match="probabilities are not finite"):
        list(broken.follow(*broken.submit(Request([1, 2], sampling))))
    with pytest.raises(UserError, match="probabilities are not finite"):
        beam_search(broken, [1, 2], beams=2, max_tokens=2)


def test_what_cannot_be_judged_or_asked_is_counted_and_wrong(engine):
    class Broken(Judge):
        def score(self, problem, text):
            if problem.kind == "b":
                raise RuntimeError("no idea")
            return None if len(problem.question) == 1 else Score(True, True)

    said = []
    long = Problem.ask("1" * 60, "3", kind="a")
    solved = solve(engine, Broken(), [*PROBLEMS, long], n=2, sampling=WARM, log=said.append)
    assert len(said) == 1 and "10 of 14 answers to judge" in said[0]
    assert solved.pass_at[1][0] == pytest.approx(4 / 14)


def test_a_problem_that_cannot_be_asked_harms_no_other(engine):
    spoken = Problem([{"role": "assistant", "content": "1"}], "3", kind="a")
    said = []
    mixed = solve(engine, Judge(), [PROBLEMS[0], spoken, PROBLEMS[2]], n=2, sampling=WARM, log=said.append)
    plain = solve(engine, Judge(), [PROBLEMS[0], PROBLEMS[1], PROBLEMS[2]], n=2, sampling=WARM)
    assert all(record.error for record in mixed.records[1]) and len(mixed.records[1]) == 2
    assert [list(mixed.records[i]) for i in (0, 2)] == [list(plain.records[i]) for i in (0, 2)]
    assert "2 of 6 answers to judge could not be judged" in said[0]


@pytest.mark.parametrize("gives", [None, True, (True,), ("yes", "no"), "no", (float("nan"), True), (1, 2)], ids=repr)
def test_what_is_no_score_counts_as_an_error_and_not_as_right(engine, gives):
    class Odd(Judge):
        def score(self, problem, text):
            return gives

    said = []
    solved = solve(engine, Odd(), PROBLEMS[:1], sampling=WARM, log=said.append)
    assert solved.pass_at == {1: (0, 0)} and len(said) == 1
    assert f"it returned {gives!r} instead of a Score" in solved.records[0][0].error


def test_a_tool_that_there_is_not_and_no_answers_are_refused(engine):
    class Baker(Judge):
        tools = ("calculator", "oven")

    with pytest.raises(UserError, match="unknown tool 'oven'; available tools: calculator"):
        solve(engine, Baker(), PROBLEMS, sampling=WARM)
    with pytest.raises(UserError, match="n=0 answers"):
        solve(engine, Judge(), PROBLEMS, n=0, sampling=WARM)


def test_there_is_no_score_over_no_problems(engine):
    with pytest.raises(UserError, match="the task judge has no problems to solve"):
        solve(engine, Judge(), [], n=2, sampling=WARM)


@pytest.mark.quick
@pytest.mark.parametrize("answers, right", [(1, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(answers, right):
    for k in range(1, answers + 1):
        chosen = list(itertools.combinations(range(answers), k))
        share = sum(any(i < right for i in pick) for pick in chosen) / len(chosen)
        assert pass_at_k(answers, right, k) == pytest.approx(share)
    assert pass_at_k(answers, 0, answers + 1) == 0
