"""Conversations in tokens, a dialogue in the terminal, explanations and scores."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from documents import texts
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import Letters

from jaxchat.decode import explain
from jaxchat.decode.dialogue import Dialogue, talk
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sample import Sample
from jaxchat.decode.sampling import SamplingParams
from jaxchat.decode.tools import Calculator
from jaxchat.errors import UserError
from jaxchat.model import Transformer
from jaxchat.tokenizer import Tokenizer, TokenizerConfig, chat, train_tokenizer
from jaxchat.tokenizer.chat_format import NANOCHAT, ChatFormat, Marks

NAMES = ("user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end")
SPECIALS = {name: 50 + i for i, name in enumerate((*NAMES, "output_start", "output_end"))}
US, UE, AS, AE, PS, PE, OS, OE = SPECIALS.values()
WORDS = Letters(**SPECIALS)


def said(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


def test_a_conversation_is_the_tokens_and_mask_written_by_hand() -> None:
    parts = [
        {"type": "text", "text": "3"},
        {"type": "python", "text": "45"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": "7"},
    ]
    messages = said(("system", "1"), ("user", "2"), ("assistant", parts), ("user", "8"), ("assistant", "9"))
    ids, loss_mask = chat.render(messages, WORDS)  # type: ignore[arg-type]
    first = [*WORDS.encode("1\n\n2")]
    expected = [0, US, *first, UE, AS, 3, PS, 4, 5, PE, OS, 6, OE, 7, AE, US, 8, UE, AS, 9, AE]
    assert ids == expected
    taught = [3, PS, 4, 5, PE, 7, AE, 9, AE]
    assert [token for token, learn in zip(ids, loss_mask) if learn] == taught
    open_ids, open_mask = chat.render(messages[:2], WORDS, complete=True)  # type: ignore[arg-type]
    assert open_ids == ids[: len(open_ids)] == [0, US, *first, UE, AS]
    assert not any(open_mask)


BAD = {
    "nothing": ([], "at least one message"),
    "order": (said(("user", "1"), ("user", "2")), "message 1 has the role 'user'; expected 'assistant'"),
    "begins": (
        said(
            ("assistant", "1"),
        ),
        "message 0 has the role 'assistant'; expected 'user'",
    ),
    "unknown": (
        said(
            ("robot", "1"),
        ),
        "role 'robot'",
    ),
    "empty": (
        said(
            ("user", ""),
        ),
        "has no text",
    ),
    "system": (said(("system", "1"), ("assistant", "2")), "followed by a user message"),
    "part": (said(("user", "1"), ("assistant", [{"type": "image", "text": "2"}])), "part of type 'image'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_conversation_that_is_none_is_refused(bad: str) -> None:
    messages, sentence = BAD[bad]
    with pytest.raises(UserError, match=sentence):
        chat.render(messages, WORDS)  # type: ignore[arg-type]


def test_the_assistant_answers_the_user_only() -> None:
    with pytest.raises(UserError, match="ends with a user message"):
        chat.render(said(("user", "1"), ("assistant", "2")), WORDS, complete=True)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(texts(200), vocab=300, config=TokenizerConfig())


some_text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
call = st.tuples(some_text, some_text).map(
    lambda pair: [{"type": "python", "text": pair[0]}, {"type": "python_output", "text": pair[1]}]
)
parts_of_text = st.lists(call, min_size=1, max_size=2).flatmap(
    lambda calls: st.lists(some_text, min_size=len(calls), max_size=len(calls)).map(
        lambda told: [
            part for call, text in zip(calls, told, strict=True) for part in (*call, {"type": "text", "text": text})
        ]
    )
)
exchange = st.tuples(some_text, some_text | parts_of_text)
dialogues = st.lists(exchange, min_size=1, max_size=3).map(
    lambda pairs: said(*(turn for asked, told in pairs for turn in (("user", asked), ("assistant", told))))
)


@given(messages=dialogues)
@settings(max_examples=60, deadline=None)
def test_parsing_inverts_rendering(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> None:
    ids = chat.render(messages, tokenizer).ids
    assert chat.parse(ids, tokenizer) == messages
    assert chat.render(chat.parse(ids, tokenizer), tokenizer).ids == ids
    assert chat.parse(chat.render(messages[:-1], tokenizer, complete=True).ids, tokenizer) == messages[:-1]


@given(messages=dialogues, cut=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_conversation_that_breaks_off_is_parsed_as_far_as_it_goes(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], cut: float
) -> None:
    ids = chat.render(messages, tokenizer).ids
    found = chat.parse(ids[: int(cut * len(ids))], tokenizer)
    assert len(found) <= len(messages)
    assert found[:-1] == messages[: max(len(found) - 1, 0)]


@pytest.mark.parametrize(
    "ids", [[0, 3], [0, US, AS], [0, US, 1, AE], [0, AS, PS, AE], [0, AS, OE], [0, US, PS], [0, US, 1, UE, 2], [US, 0]]
)
def test_tokens_in_an_order_that_no_conversation_has_are_refused(ids: list[int]) -> None:
    with pytest.raises(chat.Malformed, match=r"token \d of a conversation is .*, out of order"):
        chat.parse(ids, WORDS)  # type: ignore[arg-type]


def test_a_system_message_without_words_is_none() -> None:
    rest = said(("user", "1"), ("assistant", "2"))
    assert chat.render([*said(("system", "")), *rest], WORDS) == chat.render(rest, WORDS)  # type: ignore[arg-type]


def template(messages: list[dict[str, Any]], chat_format: ChatFormat = NANOCHAT, **options: Any) -> str:
    """As transformers compiles and fills in a template."""
    sandbox = pytest.importorskip("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(sentence: str) -> None:
        raise UserError(sentence)

    environment.globals["raise_exception"] = refuse
    return environment.from_string(chat.template(chat_format)).render(messages=messages, **options)


@given(messages=dialogues, system=st.none() | st.just("") | some_text, complete=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_template_writes_what_is_rendered(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], system: str | None, complete: bool
) -> None:
    spoken = [*([] if system is None else said(("system", system))), *(messages[:-1] if complete else messages)]
    ids = chat.render(spoken, tokenizer, complete=complete).ids
    assert template(spoken, add_generation_prompt=complete) == tokenizer.decode(ids, keep_specials=True)


def test_a_format_without_tools_may_end_all_turns_alike() -> None:
    turns = {role: Marks(f"<|{role}|>", "<|end|>", in_loss=role == "assistant") for role in ("user", "assistant")}
    chat_format = ChatFormat("<|bos|>", turns, parts={})
    assert chat_format.specials == ("<|bos|>", "<|user|>", "<|end|>", "<|assistant|>")
    messages = [*said(("user", "Hello")), {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}]
    assert template(messages, chat_format) == "<|bos|><|user|>Hello<|end|><|assistant|>Hi<|end|>"


@pytest.mark.parametrize("bad", ["order", "begins", "system", "unknown"])
def test_the_template_refuses_what_rendering_refuses(bad: str) -> None:
    with pytest.raises(UserError):
        template(BAD[bad][0])


def test_transformers_fills_in_the_template(tokenizer: Tokenizer) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = said(("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Why?"))
    (text,), _ = utils.render_jinja_template(
        [messages], chat_template=chat.template(NANOCHAT), add_generation_prompt=True
    )
    assert text == tokenizer.decode(chat.render(messages, tokenizer, complete=True).ids, keep_specials=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = small.october2025()
    params = jax.tree.map(jnp.asarray, small.parameters(config))
    return Engine(Transformer(config), params, WORDS, EngineConfig(length=80, slots=1))  # type: ignore[arg-type]


SHORT = SamplingParams(temperature=1.0, max_tokens=12, seed=5)


def test_a_dialogue_remembers_its_turns_and_leaves_out_the_oldest(engine: Engine) -> None:
    dialogue = Dialogue(engine, SHORT)
    for turn in range(6):
        before = [*dialogue.messages]
        answer = "".join(dialogue.answer(f"0{turn}"))
        assert dialogue.messages == [*before, *said(("user", f"0{turn}"), ("assistant", answer or "..."))]
        seen = dialogue.messages[dialogue.left_out : -1]
        assert dialogue.last is not None
        assert list(dialogue.last.prompt) == chat.render(seen, WORDS, complete=True).ids  # type: ignore[arg-type]
        assert len(dialogue.last.prompt) + 12 <= 80
    assert dialogue.left_out > 0
    assert dialogue.left_out % 2 == 0
    assert engine.prompt_stats.reused > 0
    with pytest.raises(UserError, match=r"takes 7\d tokens"):
        list(dialogue.answer("1" * 70))
    assert len(dialogue.messages) == 12, "words that are refused are not remembered"


def test_talk_knows_its_commands(engine: Engine, tmp_path: Path) -> None:
    out, notes = io.StringIO(), io.StringIO()
    file = tmp_path / "talk.jsonl"
    lines = ["12", f"/save {file}", "/clear", "34", f"/save {file}", "/save", "/save /proc/nope/x", "/nope", "", "56"]
    dialogue = Dialogue(engine, SHORT)
    talk(dialogue, iter(lines), out, notes)
    first, second = (json.loads(line)["messages"] for line in file.read_text().splitlines())
    assert [messages[0]["content"] for messages in (first, second)] == ["12", "34"]
    assert out.getvalue().splitlines() == [messages[1]["content"].replace("...", "") for messages in (first, second)]
    for part in ("new conversation", "saved to", "/save needs a file", "cannot write /proc/nope/x", "/nope is unknown"):
        assert part in notes.getvalue()
    assert dialogue.messages == second


def test_a_dialogue_loses_nothing_to_a_file_that_cannot_be_written(engine: Engine, tmp_path: Path) -> None:
    notes, file = io.StringIO(), tmp_path / "talk.jsonl"
    file.write_text("mine\n")
    dialogue = Dialogue(engine, SHORT)
    lines = [f"/save {file}", "12", "/save a\0b", "/save ~nobody-at-all/x", f"/save {tmp_path}", f"/save {file}"]
    talk(dialogue, iter(lines), io.StringIO(), notes)
    first, *refusals, last, _ = notes.getvalue().replace("you: ", "").replace("model: ", "").splitlines()
    assert first == "there is nothing to save yet: send a message first"
    assert len(refusals) == 3 and "no such home directory" in refusals.pop(1)
    assert all("give another path to /save" in refusal for refusal in refusals)
    assert last == f"saved to {file}"
    assert file.read_text() == "mine\n" + json.dumps({"messages": dialogue.messages}) + "\n"


class Five(Calculator):
    def __call__(self, call: str) -> str:
        return "5"


class Scripted:
    """An engine that says what it is told; where a tool has answered, the tool's tokens come instead."""

    tokenizer, shape = WORDS, EngineConfig(length=80)

    def __init__(self, *tokens: int) -> None:
        self._tokens = tokens

    def submit(self, request: Request) -> list[Sample]:
        return [Sample(WORDS, request, tuple(request.prompt), 0, context=80, ends={AE})]  # type: ignore[arg-type]

    def follow(self, sample: Sample) -> Iterator[str]:
        for token in self._tokens:
            sample.give(token, 0.0, 0.0)
            yield sample.take_text()


def test_a_dialogue_remembers_a_tool_call_as_it_was_written() -> None:
    dialogue = Dialogue(Scripted(3, PS, 4, 5, PE, 0, 0, 0, 7, AE), SHORT, [Five()])  # type: ignore[arg-type]
    assert "".join(dialogue.answer("12")) == "3[45 = 5] 7"
    assert [part["text"] for part in dialogue.messages[-1]["content"]] == ["3", "45", "5", "7"]
    assert dialogue.last is not None
    said = [*dialogue.last.prompt, *dialogue.last.tokens]
    assert chat.render(dialogue.messages, WORDS).ids == said  # type: ignore[arg-type]
    disordered = Dialogue(Scripted(PE, 3, AE), SHORT, [Five()])  # type: ignore[arg-type]
    assert "".join(disordered.answer("12")) == disordered.messages[-1]["content"] == "3"


def test_an_explanation_agrees_with_the_choice_and_the_full_forward(engine: Engine) -> None:
    params = SamplingParams(temperature=0.7, top_k=6, top_p=0.8, max_tokens=10, seed=3, ignore_end=True)
    answer = engine.generate([Request([1, 2, 3], params)])[0][0]
    steps = explain.explain(engine, [1, 2, 3], answer.tokens, params)
    logits_TV = engine.forward([1, 2, 3, *answer.tokens])
    for t, (candidates, token) in enumerate(zip(steps, answer.tokens)):
        (chosen,) = [c for c in candidates if c.chosen]
        assert chosen.token == token
        assert np.log(chosen.probabilities["model"]) == pytest.approx(answer.logprobs[t], abs=1e-4)
        assert np.log(chosen.probabilities["min_p"]) == pytest.approx(answer.sampling_logprobs[t], abs=1e-4)
        z_V = logits_TV[2 + t].astype(np.float64)
        assert [c.token for c in candidates][:8] == np.argsort(-z_V)[:8].tolist()
        warm_V = np.exp(z_V / 0.7) / np.exp(z_V / 0.7).sum()
        assert candidates[0].probabilities["temperature"] == pytest.approx(warm_V.max(), abs=1e-5)
        assert sum(c.probabilities["top_k"] > 0 for c in candidates) == 6
        assert sum(c.probabilities["top_k"] for c in candidates) == pytest.approx(1, abs=1e-5)
    assert explain.step_table(engine.tokenizer, 1, steps[0], params).row_count == len(steps[0])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_explanation_knows_penalties_and_min_p(engine: Engine, temperature: float) -> None:
    params = SamplingParams(
        temperature,
        min_p=0.1,
        repetition_penalty=1.7,
        presence_penalty=0.5,
        frequency_penalty=0.8,
        logit_bias={9: 1.5},
        max_tokens=77,
        seed=3,
        ignore_end=True,
    )
    answer = engine.generate([Request([1, 2, 3], params)])[0][0]
    assert len(answer.tokens) == 77, "prompt and answer fill the context"
    for t, candidates in enumerate(explain.explain(engine, [1, 2, 3], answer.tokens, params)):
        (chosen,) = [c for c in candidates if c.chosen]
        assert np.log(chosen.probabilities["model"]) == pytest.approx(answer.logprobs[t], abs=1e-4)
        assert np.log(chosen.probabilities["min_p"]) == pytest.approx(answer.sampling_logprobs[t], abs=1e-4)


def test_a_score_is_the_loss(engine: Engine) -> None:
    ids = [0, 5, 9, 9, 31, 2]
    scored = explain.score(engine, ids)
    z_TV = engine.forward(ids).astype(np.float64)[:-1]
    expected = [z_V[token] - np.log(np.exp(z_V).sum()) for z_V, token in zip(z_TV, ids[1:])]
    np.testing.assert_allclose([s.logprob for s in scored], expected, atol=1e-6)
    table = explain.score_table(engine.tokenizer, scored)
    assert f"{-np.mean(expected):.4f}" in str(table.columns[-1].footer)
    assert len(explain.score(engine, [1] * 80)) == 79, "a text may fill the context"
    with pytest.raises(UserError, match="the text has 81 tokens, but the context has 80"):
        explain.score(engine, [1] * 81)
