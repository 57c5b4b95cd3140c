"""What launch.chat is asked to do, and what it says of answers."""

import json
import time
from pathlib import Path
from typing import Any

import exports
import jax
import numpy as np
import pytest
from letters import Letters

import launch.chat
from jaxchat import terminal
from jaxchat.decode.requests import Request
from jaxchat.decode.sample import Sample
from jaxchat.decode.tools import Calculator
from jaxchat.errors import UserError

BEAMS = ["--prompt=a", "--beams=2"]


@pytest.mark.parametrize(
    ("said", "argv"),
    [
        ("--score needs a text", ["--score="]),
        ("leave out --prompt", ["--score=a", "--prompt=a"]),
        ("leave out --explain", ["--score=a", "--explain"]),
        ("--beams needs a --prompt", ["--beams=2"]),
        ("--num_samples needs a --prompt", ["--num_samples=2"]),
        ("--explain needs a --prompt", ["--explain"]),
        ("leave out --num_samples", [*BEAMS, "--num_samples=2"]),
        ("leave out --explain", [*BEAMS, "--explain"]),
        ("leave out --tools", [*BEAMS, "--tools=calculator"]),
        ("leave out --stop", [*BEAMS, "--stop=a"]),
        ("leave out --temperature", [*BEAMS, "--temperature=0"]),
        ("leave out --min_p", [*BEAMS, "--min_p=0.1"]),
        ("leave out --sampling", [*BEAMS, "--sampling=greedy"]),
        ("leave out --seed", [*BEAMS, "--seed=1"]),
        ("leave out --speculative", [*BEAMS, "--speculative"]),
        ("leave out --draft", [*BEAMS, "--draft=nowhere"]),
        ("leave out --top_k", ["--score=a", "--top_k=1"]),
        ("leave out --max_tokens", ["--score=a", "--max_tokens=1"]),
        ("leave out --style", ["--score=a", "--style=chat"]),
        ("equal answers", ["--prompt=a", "--num_samples=3", "--temperature=0"]),
        ("equal answers", ["--prompt=a", "--num_samples=2", "--sampling=greedy"]),
        ("equal answers", ["--prompt=a", "--num_samples=2", "--top_k=1"]),
    ],
)
def test_options_that_would_be_left_out_in_silence_are_refused(said: str, argv: list[str]) -> None:
    with pytest.raises(UserError, match=said):
        launch.chat.main(["--checkpoint=nowhere", *argv])


def test_options_that_go_together_are_not_refused() -> None:
    for argv in (
        [],
        ["--tools=calculator", "--stop=a"],
        ["--prompt=a", "--explain", "--num_samples=2"],
        BEAMS,
        [*BEAMS, "--max_tokens=9"],
    ):
        with pytest.raises(UserError, match="no checkpoint in nowhere"):
            launch.chat.main(["--checkpoint=nowhere", *argv])


BEGIN, END, RESULT, DONE = range(50, 54)
WORDS = Letters(python_start=BEGIN, python_end=END, output_start=RESULT, output_end=DONE, assistant_end=54)


class Scripted:
    """An engine that says `tokens`, one per step of a hundredth of a second; the first step compiles something."""

    tokenizer, ends = WORDS, {54}

    def __init__(self, *tokens: int) -> None:
        self._tokens, self.asked = list(tokens), list[Request]()

    def submit(self, request: Request) -> list[Sample]:
        self.asked.append(request)
        self._sample = Sample(WORDS, request, tuple(request.prompt), 0, context=80, ends={54})  # type: ignore[arg-type]
        return [self._sample]

    def step(self, *, interleave: bool) -> bool:
        if not self._sample.tokens:
            time.sleep(0.3)
            size = len(self._tokens) + 40
            jax.jit(lambda x: x * 3 + time.monotonic())(np.ones(size, np.float32))
        time.sleep(0.01)
        self._sample.give(self._tokens.pop(0), 0.0, 0.0)
        return not self._sample.finish_reason


def chat(engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *flags: str, stage: str = "sft") -> Any:
    """The result of launch.chat with this engine."""
    path = exports.write_run(tmp_path, exports.model(depth=1), stage=stage)
    monkeypatch.setattr(terminal, "load_engine", lambda *args, **kwargs: engine)
    return launch.chat.main([f"--checkpoint={path}", "--prompt=12", *flags])


def test_a_chat_model_has_its_tools_and_a_call_is_shown_with_its_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [BEGIN, *WORDS.encode("9"), END]  # A number is arithmetic too.
    engine = Scripted(*call, 0, 0, 0, *WORDS.encode("7"), 54)
    told = chat(engine, monkeypatch, tmp_path)
    assert [type(tool) for tool in engine.asked[0].tools] == [Calculator]
    assert told["text"] == "[9 = 9] 7" == capsys.readouterr().out.strip()
    assert 50 < told["tokens_per_second"] <= 100, "without the first step, which compiled"
    off = Scripted(*call, *WORDS.encode("7"), 54)
    assert chat(off, monkeypatch, tmp_path / "off", "--tools")["text"] == "[9] 7" and not off.asked[0].tools


def test_a_rate_of_compilation_alone_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert chat(Scripted(54), monkeypatch, tmp_path)["tokens_per_second"] is None


def test_a_model_that_continues_texts_has_no_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Scripted(5, 54)
    assert chat(engine, monkeypatch, tmp_path, stage="pretrain")["text"] == "5" and not engine.asked[0].tools
    with pytest.raises(UserError, match=r"continues texts and calls no tools: leave out --tools, or add --style=chat"):
        chat(engine, monkeypatch, tmp_path / "more", "--tools=calculator", stage="pretrain")
    forced = chat(
        Scripted(5, 54), monkeypatch, tmp_path / "forced", "--tools=calculator", "--style=chat", stage="pretrain"
    )
    assert forced["text"] == "5", "the remedy works"


def test_a_model_of_single_turns_is_known_by_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows/sft-train.json"
    path.parent.mkdir()
    assert terminal._turns_notice(tmp_path) == "", "imported, or trained by an earlier version"
    for counts, single in (([{"several": 0}], True), ([{"several": 0}, {"several": 3}], False), ([{"rows": 1}], False)):
        path.write_text(json.dumps(counts))
        assert bool(terminal._turns_notice(tmp_path)) == single
