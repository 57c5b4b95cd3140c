"""Answers drawn, rewarded, scored and laid out as a batch; what cannot be scored is left out."""

import dataclasses
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from letters import Letters

from jaxchat.decode.requests import Completion, Request
from jaxchat.errors import NOT_FINITE, UserError
from jaxchat.objectives.policy import OBJECTIVES
from jaxchat.rl.reinforcement import Reinforcement
from jaxchat.rl.rollouts import RolloutStream, _usable_problems
from jaxchat.rl.settings import RL
from jaxchat.sharding import Mesh, make_mesh
from jaxchat.tasks import Problem

TOKENIZER = Letters(user_start=50, user_end=51, assistant_start=52, assistant_end=53)
TASK = """
from jaxchat.tasks.task import Problem, Score

class Digits:
    name = "digits"
    tools = ()

    def problems(self, split):
        return [Problem.ask(str(i), str(i)) for i in range(10)]

    def score(self, problem, text):
        if text == "seven":
            raise RuntimeError("seven")
        right = text.startswith(problem.answer)
        return Score(right, right)
"""
ROW = 24


class Engine:
    """Answers with the question's digit and some more, the length by the noise; what it was asked is kept."""

    tokenizer = TOKENIZER

    def __init__(self, isolate: bool = True, right: float = 0.5) -> None:
        config = SimpleNamespace(vocab=60, isolate_documents=isolate)
        self.transformer, self.right = SimpleNamespace(config=config), right
        self.asked: list[list[Request]] = []

    def load(self, params: Any) -> None:
        self.params, self.loaded = params, True

    def unload(self) -> None:
        self.loaded = False

    def generate(self, requests: list[Request]) -> list[list[Completion]]:
        self.asked.append(requests)
        return [[self.answer(request, i) for i in range(request.n)] for request in requests]

    def answer(self, request: Request, index: int) -> Completion:
        noise = np.random.default_rng([request.sampling.seed, index])
        digit = request.prompt[2] if noise.random() < self.right else 8
        size = int(noise.integers(1, request.sampling.max_tokens))
        tokens = (digit, *noise.integers(10, 50, size - 1).tolist(), 53)
        logprobs = tuple(-noise.random(len(tokens)))
        sampled = tuple(i != 1 or len(tokens) < 3 for i in range(len(tokens)))  # One token was a tool's.
        return Completion(TOKENIZER.decode(tokens), tokens, logprobs, logprobs, sampled, "stop")


def score(params: Any, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The sampler's numbers and a little more, so that the gap is known; under other parameters still more."""
    found = columns["sampled"] + np.float32(0.25 if params == "reference" else 0.001)
    return found, np.ones_like(found)


@pytest.fixture
def task(tmp_path) -> str:
    (tmp_path / "digits.py").write_text(TASK)
    return f"{tmp_path / 'digits.py'}:Digits"


def stream(task: str, engine: Any = None, **settings: Any) -> RolloutStream:
    fields = {"tasks": (task,), "prompts": 3, "samples": 4, "max_tokens": 6, "objective": "reinforce_mean"} | settings
    made = RolloutStream(
        RL(**fields),
        engine or Engine(),
        score,
        seed=1,
        row_length=ROW,
        micro_rows=2,
        reference="reference",
        log=said.append,
    )
    return made


said: list[str] = []


@pytest.fixture(autouse=True)
def silence():
    said.clear()


def test_every_answer_lies_in_a_row_with_its_mask_and_its_numbers(task):
    engine = Engine()
    one = stream(task, engine)
    batch, used = one.batch(0, "params")
    assert engine.params == "params" and not engine.loaded and batch["tokens"].shape == (6, 2, ROW) and 0 < used <= 6
    assert not batch["weights"][used:].any() and not batch["norms"][used:].any()
    flat = {name: column.reshape(-1, ROW) for name, column in batch.items()}
    found = {}
    for row in range(2 * used):
        for segment in range(1, 1 + int(flat["segments"][row].max())):
            here = flat["segments"][row] == segment
            if flat["tokens"][row, here].any():
                ids = (*flat["tokens"][row, here], flat["targets"][row, here][-1])
                found[ids] = {name: column[row, here] for name, column in flat.items()}
    (requests,) = engine.asked
    for request in requests:
        rewards = [
            answer.text.startswith(chr(48 + request.prompt[2]))
            for answer in (engine.answer(request, i) for i in range(4))
        ]
        for i, reward in enumerate(rewards):
            answer = engine.answer(request, i)
            columns = found.pop((*request.prompt, *answer.tokens))
            np.testing.assert_array_equal(columns["tokens"][1:], columns["targets"][:-1])
            first = len(request.prompt) - 1
            mask = np.array([False] * first + list(answer.sampled))
            np.testing.assert_array_equal(columns["weights"] > 0, mask, "the end is trained, a tool's words are not")
            np.testing.assert_allclose(columns["advantages"][mask], reward - np.mean(rewards), atol=1e-6)
            sampled = np.array(answer.sampling_logprobs)[list(answer.sampled)]
            np.testing.assert_allclose(columns["old_logprobs"][mask], sampled + 0.001, atol=1e-6)
    assert not found
    assert one.facts["gap_max"] == pytest.approx(0.001, rel=1e-3)
    assert one.facts["gap_kl"] == pytest.approx(-0.001, rel=1e-3)


def test_a_step_counts_the_tokens_that_it_trains(task):
    engine, stage = Engine(), Reinforcement.__new__(Reinforcement)
    stage._stream, stage._records, stage._dispatched = stream(task, engine), {}, 0.0
    stage._rl, stage._setup = stage._stream._rl, SimpleNamespace(mesh=make_mesh(Mesh(1), rows=2))
    stage.batch_at(0, SimpleNamespace(params=None))
    sampled = [engine.answer(request, i).sampled for request in engine.asked[0] for i in range(4)]
    assert stage.numbers(1, {})["trained_tokens"] == sum(map(sum, sampled)) < sum(map(len, sampled))


def test_answers_have_rows_of_their_own_where_documents_see_each_other(task):
    batch, used = stream(task, Engine(isolate=False)).batch(0, None)
    assert used == 6
    assert batch["segments"].max() == 2, "an answer and the padding after it"


def test_the_same_seed_draws_the_same_again_and_no_two_batches_share_noise(task):
    engine = Engine()
    one = stream(task, engine)
    first = [one.batch(i, None)[0] for i in range(3)]
    again = stream(task)
    again.cursor = 2 * 3
    np.testing.assert_array_equal(again.batch(2, None)[0]["tokens"], first[2]["tokens"])
    seeds = [request.sampling.seed for asked in engine.asked for request in asked]
    assert len(set(seeds)) == len(seeds) == 9


def test_minibatches_take_every_answer_once_a_pass(task):
    engine = Engine()
    one = stream(task, engine, epochs=2, minibatches=3)
    sizes = []
    for index in range(12):
        batch, _ = one.batch(index, None)
        assert batch["tokens"].shape[:2] == (2, 2)
        sizes.append(int((batch["weights"] > 0).sum()))
    assert len(engine.asked) == 2, "a rollout batch for six updates"
    assert sum(sizes[:3]) == sum(sizes[3:6]), "each pass trains every token"


def test_an_answer_that_cannot_be_scored_trains_nothing_and_is_counted(task):
    class Sevens(Engine):
        def answer(self, request, index):
            made = super().answer(request, index)
            return dataclasses.replace(made, text="seven") if index == 2 else made

    engine = Sevens()
    one = stream(task, engine)
    batch, _ = one.batch(0, None)
    assert one.facts["reward_errors"] == 3
    assert len(said) == 2 and "its mean in metrics.jsonl skips such answers" in said[1]
    assert "reward 'correct' of task digits failed: seven; such answers are not trained on" in said[0]
    trained = (batch["weights"] > 0).sum()
    every = sum(sum(engine.answer(request, i).sampled) for request in engine.asked[0] for i in (0, 1, 3))
    assert trained == every and np.isfinite(batch["advantages"]).all()


def test_groups_whose_answers_are_equally_good_are_counted_and_train_nothing(task):
    one = stream(task, Engine(right=1.0))
    batch, _ = one.batch(0, None)
    assert one.facts["equal_groups"] == one.facts["groups"] == 3 and not batch["advantages"].any()
    one.batch(1, None)
    assert len(said) == 1
    assert "rollout batch 0: for each of the 3 problems sampled all answers have the same reward" in said[0]
    assert "cut" not in said[0]


def test_a_batch_of_answers_that_are_all_cut_names_the_limit(task):
    class Cut(Engine):
        def answer(self, request, index):
            return dataclasses.replace(super().answer(request, index), finish_reason="length")

    stream(task, Cut(right=0.0)).batch(0, None)
    assert re.search(r", and (\d+) of \1 answers were cut after rl\.max_tokens=\d+: raise it$", said[0])


def test_answers_of_a_model_without_finite_probabilities_end_the_run(task):
    class Broken(Engine):
        def answer(self, request, index):
            return dataclasses.replace(super().answer(request, index), error=NOT_FINITE)

    with pytest.raises(UserError, match="probabilities are not finite"):
        stream(task, Broken()).batch(0, None)


@pytest.mark.parametrize("gives", ["math.nan", "1 / 0", "'much'", "1e39", "-1e16"])
def test_a_batch_without_any_reward_is_refused_with_the_reason(tmp_path, gives):
    (tmp_path / "lost.py").write_text(
        "import math\n" + TASK.replace("right = text.startswith(problem.answer)", f"right = {gives}")
    )
    with pytest.raises(
        UserError, match=r"none of the 12 answers of rollout batch 0 .*'correct' of task digits"
    ) as told:
        stream(f"{tmp_path / 'lost.py'}:Digits").batch(0, None)
    assert "\n" not in str(told.value) and len(said) <= 2, "said once each"
    measured = stream(f"{tmp_path / 'lost.py'}:Digits", rewards=("ending",))
    measured.batch(0, None)
    assert "reward_correct" not in measured.facts and measured.facts["reward_errors"] == 0


def test_long_answers_lose_reward_by_their_tokens_and_that_is_told_apart(task):
    """DAPO's penalty on top of the reward: a tool's words count, for they fill the context too."""
    engine = Engine()
    one = stream(task, engine, overlong_cushion=4, objective="reinforce", samples=6)
    batch, _ = one.batch(0, None)
    expected = sorted(
        float(answer.text.startswith(chr(48 + request.prompt[2]))) - max(0, len(answer.tokens) - 2) / 4
        for request in engine.asked[0]
        for answer in (engine.answer(request, i) for i in range(6))
    )
    ends = batch["targets"] == 53
    np.testing.assert_allclose(sorted(batch["advantages"][ends & (batch["weights"] > 0)]), expected, atol=1e-6)
    assert one.facts["reward"] == pytest.approx(np.mean(expected))
    assert one.facts["reward"] == pytest.approx(one.facts["reward_correct"] + one.facts["reward_overlong"])
    assert one.facts["reward_overlong"] < 0


def test_bonuses_are_told_apart_and_before_their_weight(task):
    one = stream(task, rewards=("correct", "ending", "brevity"), reward_weights=(1.0, 0.25, 0.5))
    one.batch(0, None)
    facts = one.facts
    assert facts["reward_ending"] == facts["reward_brevity"] == 1 and 0 < facts["reward_correct"] < 1
    assert facts["reward"] == pytest.approx(facts["reward_correct"] + 0.25 + 0.5)


def test_dynamic_sampling_asks_for_more_until_answers_differ(task):
    class Often(Engine):
        def generate(self, requests):
            self.right = 1.0 if not self.asked else 0.5
            return super().generate(requests)

    engine = Often()
    one = stream(task, engine, dynamic_rounds=4, samples=8)
    batch, _ = one.batch(0, None)
    assert len(engine.asked) > 1 and one.facts["equal_groups"] >= 3 and one.cursor == 3 * len(engine.asked)
    assert batch["advantages"].any()
    seeds = [request.sampling.seed for asked in engine.asked for request in asked]
    assert len(set(seeds)) == len(seeds), "no two rounds share noise"
    never = stream(task, Engine(right=1.0), dynamic_rounds=2)
    assert not never.batch(0, None)[0]["advantages"].any(), "and gives up"
    assert never.facts["equal_groups"] == never.facts["groups"] == 9 and "the 9 problems sampled" in said[-1]


def test_the_kl_to_the_start_lowers_the_advantage_of_what_leads_to_it(task):
    plain = stream(task, kl=0.0)
    held = stream(task, kl=0.5)
    (without, _), (with_, _) = plain.batch(0, None), held.batch(0, None)
    mask = without["weights"] > 0
    cost = (without["advantages"] - with_["advantages"])[mask]
    assert plain.facts["kl"] == held.facts["kl"] < 0, "here the reference gives everything a higher probability"
    still_to_come = cost / (0.5 * (0.001 - 0.25))  # How many trained tokens, this one among them.
    np.testing.assert_allclose(still_to_come, np.round(still_to_come), atol=1e-3)
    assert set(np.round(still_to_come)) == set(range(1, int(still_to_come.max() + 1.5)))
    assert "kl" not in stream(task).facts


@pytest.mark.parametrize("settings", [{"kl": 0.0, "objective": "grpo"}, {"kl": 0.0, "objective": "reinforce"}])
def test_a_kl_without_weight_is_measured_only(task, settings):
    measured, plain = stream(task, **settings), stream(task, **settings | {"kl": None})
    (with_, _), (without, _) = measured.batch(0, None), plain.batch(0, None)
    assert with_.keys() == without.keys() and measured.facts["kl"] != 0
    for name, column in with_.items():
        np.testing.assert_array_equal(column, without[name])


def test_every_update_takes_its_ratios_against_the_parameters_that_sampled(task):
    one = stream(task, epochs=2, minibatches=2)
    old: list[list[float]] = []
    for index in range(4):
        batch, _ = one.batch(index, f"parameters of step {index}")
        old.append(batch["old_logprobs"][batch["weights"] > 0].tolist())
    assert sorted(old[0] + old[1]) == sorted(old[2] + old[3])


@pytest.mark.parametrize("content", ["", None])
def test_a_problem_without_a_question_is_named(tmp_path, content):
    problems = f"[Problem.ask('1', '1'), Problem([{{'role': 'user', 'content': {content!r}}}], '1')]"
    path = tmp_path / "empty.py"
    path.write_text(TASK.split("class ")[0] + f"class T:\n    name, tools = 'holes', ()\n    score = None\n"
                    f"    def problems(self, split):\n        return {problems}\n")  # fmt: skip
    with pytest.raises(UserError, match=r"problem 1 of the task holes cannot be asked: message 0.*; correct it, or"):
        stream(f"{path}:T")


def test_a_problem_that_leaves_no_room_for_an_answer_is_left_out(task):
    with pytest.raises(UserError, match=r"no problem of .* leaves room for rl\.max_tokens=21 in a row of 24"):
        stream(task, max_tokens=21)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"temperature": 0.0}, "at least 1e-6"),
        ({"temperature": 1e-46}, "at least 1e-6"),
        ({"reward_weights": (1e39,)}, "from -1e\\+15 to"),
        ({"minibatches": 5}, "does not divide"),
        ({"samples": 1, "objective": "rloo"}, "compares answers"),
        ({"rewards": ("right",)}, "rl.rewards: unknown reward 'right'"),
        ({"reward_weights": (1.0, 2.0)}, "one number for each"),
        ({"reward_weights": (math.nan,)}, "one number for each"),
        ({"overlong_cushion": 300}, "must lie between 0 and"),
        ({"kl": -1.0}, "must not be negative"),
        ({"prompts": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        RL(**wrong)


def test_a_field_overrides_what_the_objective_sets():
    assert RL(objective="rloo").policy.advantage == "leave_one_out"
    assert RL(objective="rloo", advantage="standard").policy == dataclasses.replace(
        OBJECTIVES["rloo"], advantage="standard"
    )


def test_an_answer_is_judged_once_and_together_with_the_others(tmp_path):
    for number, many in enumerate(
        (
            "",
            "\n    def score_many(self, answers):\n        self.calls.append(len(answers))\n"
            "        return [RuntimeError('no') if text[0] == '8' else self.score(p, text) for p, text in answers]\n",
        )
    ):
        judged = TASK.replace("    tools = ()", "    tools, calls = (), []") + many
        judged = judged.replace("right = text", "self.calls.append(1)\n        right = text")
        (tmp_path / f"judged{number}.py").write_text(judged)
        one = stream(f"{tmp_path}/judged{number}.py:Digits", rewards=("correct", "lenient"), reward_weights=(1.0, 0.5))
        one.batch(0, None)
        calls = one._problems[0][0].calls
        if many:
            assert calls[0] == 12 and 0 < len(calls) - 1 == 12 - one.facts["reward_errors"] < 12
            assert len(said) >= 2 and "reward 'correct' of task digits failed: no" in said[0]
        else:
            assert calls == [1] * 12 and one.facts["reward"] == pytest.approx(1.5 * one.facts["reward_correct"])


@pytest.mark.parametrize("messages", [[{"role": "user", "content": ""}], [], [{"role": "assistant", "content": "hi"}]])
def test_a_problem_that_cannot_be_asked_is_named(messages):
    problems = [Problem.ask("one", "1"), Problem(messages, "2")]
    task = SimpleNamespace(name="sums", problems=lambda split: problems, tools=())
    with pytest.raises(UserError, match=r"problem 1 of the task sums cannot be asked: "):
        _usable_problems(RL(), [task], TOKENIZER, 512, print)
