"""The calculator's answers, what gets none, and tool calls in the middle of a batch."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from letters import Letters

from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import AnswerEnds, Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.decode.tools import Calculator
from jaxchat.errors import UserError
from jaxchat.model import Transformer
from jaxchat.stages import reporting
from jaxchat.tokenizer.chat_format import NANOCHAT

BEGIN, END, ANSWER, DONE = 50, 51, 52, 53


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("12*3", "36"),
        (" 1,200 + 34 ", "1234"),
        ("7/2", "3.5"),
        ("48/2", "24"),
        ("7//2 - -3", "6"),
        ("(2+3)*4 % 7", "6"),
        ("2**10", "1024"),
        ("1e3 + .5", "1000.5"),
        ("'strawberry'.count('r')", "3"),
        ('"a,b,c".count(",")', "2"),
        ("2.0**52", "4503599627370496"),
        ("1e300", "1e+300"),
        ("1000 * 1.005**360", "6022.5752122629865"),
        ("0.5**1000 * 2.0**1000", "1"),
        ("2**-1000", "9.332636185032189e-302"),
        ("(-1)**1001 + 0**1000 + 1**1000", "0"),
    ],
)
def test_arithmetic_is_answered(call: str, answer: str) -> None:
    assert Calculator()(call) == answer


UNANSWERED = [
    "",
    "9**9**9",
    "10**400",
    "(((9**64)**64)**64)**64",
    "2.0**5000",
    "(-8)**0.5",
    "1/0",
    "1e308*10",
    "__import__('os').system('true')",
    "().__class__",
    "'a'.upper()",
    "'a'*1000",
    "[1]*9",
    "x+1",
    "True+1",
    "1 if 1 else 2",
    "lambda: 1",
    "1; 2",
    "import os",
    "1 +",
    "0x10\0",
    "(-" * 60 + "1" + ")" * 60,
    "(" * 5000 + "1" + ")" * 5000,
    "-" * 200 + "1",
    "1+" * 500_000 + "1",
]


@pytest.mark.parametrize("call", UNANSWERED, ids=lambda call: call[:20])
def test_anything_else_gets_no_answer(call: str) -> None:
    assert Calculator()(call) is None


@pytest.fixture(scope="module")
def model() -> tuple[Transformer, Any]:
    config = small.october2025()
    return Transformer(config), jax.tree.map(jnp.asarray, small.parameters(config))


def engine(model: tuple[Transformer, Any], **about: Any) -> Engine:
    specials = Letters(python_start=BEGIN, python_end=END, output_start=ANSWER, output_end=DONE)
    shape = EngineConfig(length=96, slots=2, steps=4, adapt=False)
    return Engine(*model, specials, shape, **about)  # type: ignore[arg-type]


class Echo(Calculator):
    """Answers with as many letters as the call has."""

    def __call__(self, call: str) -> str | None:
        return "A" * len(call) if len(call) % 3 else None


def test_a_transcript_with_tools_is_the_sequential_one(model: tuple[Transformer, Any]) -> None:
    """Calls happen by chance: half of the mass is on the tokens that begin and end one."""
    bias = {BEGIN: 3.0, END: 3.0}
    params = [SamplingParams(1.0, logit_bias=bias, max_tokens=70, seed=seed, ignore_end=True) for seed in range(6)]
    machine = engine(model)
    prompts = [[1, 2, 3, seed + 4] for seed in range(6)]
    answers = machine.generate([Request(*asked, tools=(Echo(),)) for asked in zip(prompts, params)])
    called = 0
    for (answer,), prompt, asked in zip(answers, prompts, params):
        tokens = sequential(engine(model), prompt, asked)
        assert list(answer.tokens) == [token for token, _ in tokens]
        assert list(answer.sampled) == [sampled for _, sampled in tokens]
        assert all(logprob == 0 for logprob, sampled in zip(answer.logprobs, answer.sampled) if not sampled)
        called += sum(not sampled for sampled in answer.sampled)
    assert called > 20, "hardly a call was answered"


def test_what_a_tool_said_could_have_been_anything(model: tuple[Transformer, Any]) -> None:
    """Where tokens say what they were drawn from, a forced one was drawn from all."""
    asked = SamplingParams(100.0, top_k=55, max_tokens=80, ignore_end=True)
    machine, forced = engine(model), 0
    for answer in machine.generate([Request([1, 2], asked, n=30, tools=(Echo(),), return_support=True)])[0]:
        assert answer.support is not None
        counts_T = np.bitwise_count(answer.support).sum(axis=1)
        np.testing.assert_array_equal(counts_T == 64, ~np.array(answer.sampled))
        forced += sum(counts_T == 64)
    assert forced > 20, "hardly a call was answered"


def sequential(machine: Engine, prompt: list[int], asked: SamplingParams) -> list[tuple[int, bool]]:
    """The transcript of one request, one token at a time, each from a prompt that holds all before it."""
    said: list[tuple[int, bool]] = []
    call: list[int] | None = None
    while len(said) < asked.max_tokens:
        one = dataclasses.replace(asked, max_tokens=1)
        text = [*prompt, *(token for token, _ in said)]
        token = machine.generate([Request(text, one)])[0][0].tokens[0]
        said.append((token, True))
        if token == BEGIN:
            call = []
        elif token == END and call is not None:
            answer = Echo()(machine.tokenizer.decode(call))
            call = None
            if answer is not None:
                forced = [ANSWER, *machine.tokenizer.encode(answer), DONE]
                said += [(token, False) for token in forced[: asked.max_tokens - len(said)]]
        elif call is not None:
            call.append(token)
    return said


def test_others_are_decoded_while_a_tool_runs(model: tuple[Transformer, Any]) -> None:
    entered, done = threading.Event(), threading.Event()

    class Slow(Echo):
        def __call__(self, call: str) -> str | None:
            entered.set()
            assert done.wait(20)
            return super().__call__(call)

    calls = SamplingParams(1.0, logit_bias={BEGIN: 3.0, END: 3.0}, max_tokens=70, ignore_end=True)
    plain = SamplingParams(1.0, max_tokens=60, seed=1, ignore_end=True)
    expected = [one.tokens for (one,) in engine(model).generate([Request([1, 2], calls, tools=(Echo(),))] * 2)]
    with ThreadPoolExecutor(1) as pool:
        machine = engine(model, tool_pool=pool)
        asked, left = (machine.submit(Request([1, 2], calls, tools=(Slow(),)))[0] for _ in range(2))
        while not (asked.output and left.output):
            machine.step()
        assert entered.wait(20)
        left.cancel()
        (other,) = machine.submit(Request([3, 4], plain))
        while not other.finish_reason:
            machine.step()
        assert asked.output and not asked.finish_reason and machine.slots.free == 1
        begun, used = time.perf_counter(), time.process_time()
        while time.perf_counter() - begun < 0.2:
            assert machine.step(), "it waits for the tool"
        assert time.process_time() - used < 0.1
        done.set()
        while machine.step():
            pass
    assert [asked.completion().tokens, other.completion().tokens] == [
        expected[0],
        engine(model).generate([Request([3, 4], plain)])[0][0].tokens,
    ]


class Broken(Calculator):
    def __call__(self, call: str) -> str | None:
        raise RuntimeError("no power")


class Number(Calculator):
    """Answers with what is no text."""

    def __call__(self, call: str) -> str | None:
        return 42  # type: ignore[return-value]


@pytest.mark.parametrize(("tool", "why"), [(Broken(), "no power"), (Number(), "'int' object is not iterable")])
def test_a_tool_that_fails_ends_its_request_alone(model: tuple[Transformer, Any], tool: Calculator, why: str) -> None:
    asked = SamplingParams(1.0, logit_bias={BEGIN: 9.0, END: 9.0}, max_tokens=60, seed=1)
    machine = engine(model)
    (bad,), (good,) = machine.generate([Request([1], asked, tools=(tool,)), Request([2, 3], asked)])
    assert (bad.finish_reason, bad.error) == ("error", f"the tool {type(tool).__name__} failed: {why}")
    assert good.tokens == machine.generate([Request([2, 3], asked)])[0][0].tokens


@dataclasses.dataclass(frozen=True)
class Misheard(Calculator):
    """Calculates this, whatever the call."""

    instead: str = ""

    def __call__(self, call: str) -> str | None:
        return super().__call__(self.instead)


def test_a_call_that_is_answered_elsewhere_ends_the_answer(model: tuple[Transformer, Any]) -> None:
    class Elsewhere(Calculator):
        def __call__(self, call: str) -> str | None:
            raise AnswerEnds

    asked = SamplingParams(1.0, logit_bias={BEGIN: 9.0, END: 9.0}, max_tokens=60, seed=1, ignore_end=True)
    ((answer,), (other,)) = engine(model).generate(
        [Request([1, 2], asked, tools=(tool(),)) for tool in (Elsewhere, Echo)]
    )
    end = answer.tokens.index(END, answer.tokens.index(BEGIN))
    assert (answer.finish_reason, answer.error, len(answer.tokens)) == ("call", None, end + 1)
    assert answer.tokens == other.tokens[: end + 1] and other.finish_reason == "length"


def test_a_call_that_gets_no_answer_changes_no_text(model: tuple[Transformer, Any]) -> None:
    asked = SamplingParams(1.0, logit_bias={BEGIN: 3.0, END: 3.0}, max_tokens=30, seed=1, ignore_end=True)
    machine = engine(model)
    plain = machine.generate([Request([1, 2], asked)])[0][0]
    assert END in plain.tokens[plain.tokens.index(BEGIN) :]
    heard = machine.generate([Request([1, 2], asked, tools=(Misheard(instead=call),)) for call in (*UNANSWERED, "1+1")])
    assert [answer.tokens == plain.tokens for (answer,) in heard] == [True] * len(UNANSWERED) + [False]
    assert all(all(answer.sampled) and answer.error is None for (answer,) in heard[:-1])


def test_a_tool_whose_parts_the_chat_format_lacks_is_refused(model: tuple[Transformer, Any]) -> None:
    tool = Echo()
    tool.call_part = "bash"
    with pytest.raises(UserError, match="Echo needs parts of the kind bash, which the chat format lacks"):
        engine(model).submit(Request([1], tools=(tool,)))


def test_samples_of_a_chat_model_have_the_tools_of_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    class Asked:
        def __init__(self, *args: Any, mesh: Any) -> None: ...

        def generate(self, requests: list[Request]) -> list[Any]:
            asked.extend(requests)
            return []

    monkeypatch.setattr(reporting, "Engine", Asked)
    e = SimpleNamespace(prompts=("a",), chats=True, stage_directory=tmp_path, data=SimpleNamespace(row_length=64))
    setup, state = SimpleNamespace(experiment=e, transformer=None, mesh=None), SimpleNamespace(params=None)
    tokenizer = Letters()
    for parts in (NANOCHAT.parts, {}):
        tokenizer.chat_format = dataclasses.replace(NANOCHAT, parts=parts)
        reporting.write_samples(setup, tokenizer, state, number=1, log=print)  # type: ignore[arg-type]
    assert [len(request.tools) for request in asked] == [1, 0]
