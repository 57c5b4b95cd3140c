"""Rollouts through the real engine, with a tool that the model calls by chance: what of an answer is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from letters import Letters

from jaxchat.decode import tools
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.model import Transformer
from jaxchat.rl.rollouts import RolloutStream
from jaxchat.rl.settings import RL
from jaxchat.tasks import TASKS, Problem, Score

CALL, CALLED, TOLD, DONE, START, STOP = 54, 55, 56, 57, 52, 53
TOKENIZER = Letters(
    user_start=50,
    user_end=51,
    assistant_start=START,
    assistant_end=STOP,
    python_start=CALL,
    python_end=CALLED,
    output_start=TOLD,
    output_end=DONE,
)
MOST = 24


class Echo(tools.Calculator):
    """Answers with as many letters as the call has, and not at all where three divide them."""

    def __call__(self, call: str) -> str | None:
        return "A" * len(call) if len(call) % 3 else None


class Digits:
    name, tools = "digits", ("calculator",)

    def problems(self, split: str) -> list[Problem]:
        return [Problem.ask(str(i), str(i)) for i in range(10)]

    def score(self, problem: Problem, text: str) -> Score:
        return Score(len(text) % 2 == 0, True)


class Calling(Engine):
    """Calls begin and end often."""

    def generate(self, requests):
        bias = {CALL: 3.0, CALLED: 3.0, STOP: 1.0}
        return super().generate(
            [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, logit_bias=bias)) for r in requests]
        )


def trained_by_hand(answer: list[int]) -> list[bool]:
    """Everything but what stands between a call's end and the tool's last word, found by reading the answer."""
    trained: list[bool] = []
    call: list[int] | None = None
    while len(trained) < len(answer):
        token = answer[len(trained)]
        trained.append(True)
        if token == CALL:
            call = []
        elif token == CALLED and call is not None:
            told = Echo()(TOKENIZER.decode(call))
            call = None
            if told is not None:
                forced = [TOLD, *TOKENIZER.encode(told), DONE][: len(answer) - len(trained)]
                assert answer[len(trained) : len(trained) + len(forced)] == forced
                trained += [False] * len(forced)
        elif call is not None:
            call.append(token)
    return trained


def test_calls_and_the_end_are_trained_and_what_a_tool_said_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an answer is cut in the middle of a call, or of what a tool says."""
    monkeypatch.setitem(tools.TOOLS, "calculator", Echo)
    monkeypatch.setitem(TASKS, "digits", Digits)  # type: ignore
    config = small.july2026(depth=2)
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    engine = Calling(Transformer(config), params, TOKENIZER, EngineConfig(length=32, slots=8, steps=8, adapt=False))  # type: ignore

    def score(params, columns):
        return columns["sampled"], np.ones_like(columns["sampled"])

    rl = RL(tasks=("digits",), prompts=4, samples=16, max_tokens=MOST, objective="reinforce")
    stream = RolloutStream(rl, engine, score, seed=3, row_length=32, micro_rows=4, log=pytest.fail)
    batch, used = stream.batch(0, params)
    rows = {name: column[:used].reshape(-1, 32) for name, column in batch.items()}
    cut = {"in a call": 0, "in a tool's words": 0, "ended": 0}
    seen = told = 0
    for targets, weights, segments in zip(rows["targets"], rows["weights"], rows["segments"]):
        for segment in np.unique(segments):
            here = segments == segment
            if not weights[here].any():
                continue
            first = int(np.flatnonzero(targets[here] == START)[0]) + 1
            answer, trained = targets[here][first:].tolist(), (weights[here] > 0)[first:].tolist()
            assert trained == trained_by_hand(answer)
            assert not weights[here][:first].any(), "nothing of the prompt"
            seen += 1
            told += not all(trained)
            cut["ended"] += answer[-1] == STOP and trained[-1]
            cut["in a tool's words"] += len(answer) == MOST and not trained[-1] and answer[-1] != DONE
            after_calls = answer[max((i for i, token in enumerate(answer) if token == CALLED), default=-1) + 1 :]
            cut["in a call"] += len(answer) == MOST and CALL in after_calls
    assert seen == 64 and told > 10 and all(cut.values()), (seen, told, cut)
