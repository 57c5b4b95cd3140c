"""A conversation that is interrupted."""

import io
import signal

import jax
import jax.numpy as jnp
import pytest
import small
from letters import Letters

from jaxchat import signals
from jaxchat.decode.dialogue import Dialogue, talk
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.sampling import SamplingParams
from jaxchat.model import Transformer

SPECIALS = {name: 50 + i for i, name in enumerate(("user_start", "user_end", "assistant_start", "assistant_end"))}
SHORT = SamplingParams(temperature=1.0, max_tokens=12, seed=5)


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = small.october2025(depth=1)
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    return Engine(Transformer(config), params, Letters(**SPECIALS), EngineConfig(length=80, slots=1))  # type: ignore[arg-type]


class Impatient(io.StringIO):
    """A reader who presses Ctrl-C at the first words."""

    def write(self, text: str) -> int:
        if not self.tell():
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_ends_an_answer_and_not_the_conversation(engine: Engine) -> None:
    whole, stopped, notes = Dialogue(engine, SHORT), Dialogue(engine, SHORT), io.StringIO()
    list(whole.answer("12"))
    before = signal.getsignal(signal.SIGINT)
    out = Impatient()
    with signals.handled():
        talk(stopped, iter(["12", "34"]), out, notes)
        signals.check()
    assert signal.getsignal(signal.SIGINT) is before
    assert notes.getvalue() == "you: model: (stopped)\nyou: model: you: \n"
    first, second = (message["content"] for message in stopped.messages[1::2])
    assert whole.messages[1]["content"].startswith(first) and first != whole.messages[1]["content"]
    assert out.getvalue() == f"{first}\n{second}\n"


def test_it_is_said_who_speaks_and_once_that_turns_were_single(engine: Engine) -> None:
    out, notes = io.StringIO(), io.StringIO()
    talk(Dialogue(engine, SHORT), iter(["12", "/nope", "34", "56"]), out, notes, echo=True, notice="single")
    first, second, *_ = notes.getvalue().split("/nope is unknown")
    assert first == "you: 12\nmodel: you: /nope\n"
    assert second.endswith("you: 34\nsingle\nmodel: you: 56\nmodel: you: \n"), "the notice is not repeated"
    assert len(out.getvalue().splitlines()) == 3
