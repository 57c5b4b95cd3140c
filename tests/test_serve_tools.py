"""Tools over the API: a client's functions and the calculator, called by an engine whose tokens are scripted."""

import json
from pathlib import Path
from typing import Any

import pytest
from exports import tokenizer
from serving import checkpoint, serving

from jaxchat.decode.engine import Engine
from jaxchat.tokenizer import chat

pytestmark = pytest.mark.filterwarnings("default")


class Scripted(Engine):
    """Says what `script` returns for a prompt."""

    @staticmethod
    def script(prompt: tuple[int, ...]) -> list[int]:
        raise NotImplementedError

    def step(self, **options: Any) -> bool:
        for samples in self._waiting:
            for sample in samples:
                tokens = iter(type(self).script(sample.prompt))
                while not sample.finish_reason:
                    sample.read_output()
                    if sample.output is None:
                        sample.give(0 if sample.forced else next(tokens), -0.5, -0.5)
        self._waiting.clear()
        return False


def said(*parts: str) -> list[int]:
    """Tokens of texts and names of special tokens."""
    words = tokenizer()
    return [i for part in parts for i in ([words.specials[part]] if part in words.specials else words.encode(part))]


def test_tools_the_clients_and_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    begin, end = "<|python_start|>", "<|python_end|>"
    tool = {"name": "weather", "description": "It.", "parameters": {"type": "object"}}
    asked: dict[str, Any] = {"model": "run/sft", "tools": [{"type": "function", "function": tool}]}
    messages: list[Any] = [{"role": "user", "content": "Rain?"}]
    with serving(checkpoint(tmp_path), make_engine=Scripted) as server:
        monkeypatch.setattr(Scripted, "script", staticmethod(lambda prompt: said("I look.", begin, call, end, "no")))
        first = server.client.chat.completions.create(messages=messages, **asked).choices[0]
        assert first.finish_reason == "tool_calls" and first.message.content == "I look."
        (made,) = first.message.tool_calls
        assert (made.function.name, json.loads(made.function.arguments)) == ("weather", {"city": "Oslo"})
        chunks = list(server.client.chat.completions.create(messages=messages, stream=True, **asked))
        streamed = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
        assert [(c.index, c.function.name) for c in streamed] == [(0, "weather")]
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "I look."
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

        prompts: list[tuple[int, ...]] = []

        def then(prompt: tuple[int, ...]) -> list[int]:
            prompts.append(prompt)
            return said("No. ", begin, "7*6", end, " is it.", "<|assistant_end|>")

        monkeypatch.setattr(Scripted, "script", staticmethod(then))
        result = {"role": "tool", "tool_call_id": made.id, "content": '{"rain": false}'}
        whole = server.client.chat.completions.create(
            messages=[*messages, first.message.model_dump(exclude={"parts"}, exclude_none=True), result], **asked
        ).choices[0]
        described = f"You can call these tools:\n{json.dumps(tool)}\n\nRain?"
        output = ["<|output_start|>", '{"rain": false}', "<|output_end|>"]
        expected = ["<|bos|>", "<|user_start|>", described, "<|user_end|>", "<|assistant_start|>", "I look."]
        assert list(prompts[0]) == said(*expected, begin, call, end, *output)
        assert whole.message.content == "No.  is it." and whole.finish_reason == "stop"
        parts = [("text", "No. "), ("python", "7*6"), ("python_output", "42"), ("text", " is it.")]
        assert [(part["type"], part["text"]) for part in whole.message.parts] == parts
        again = [*messages, whole.message.model_dump(exclude_none=True), {"role": "user", "content": "Oh"}]
        server.client.chat.completions.create(messages=again, model="run/sft")
        rendered = chat.render(
            [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": whole.message.parts}, again[-1]],
            tokenizer(),
            complete=True,
        )
        assert list(prompts[-1]) == rendered.ids


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_demanded_begins_the_answer(
    tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is asked to go on from there, and what it says after is the rest of the call."""
    prompts: list[tuple[int, ...]] = []
    functions = [{"type": "function", "function": {"name": name}} for name in ("weather", "clock")]
    named, begin, end = functions[0], "<|python_start|>", "<|python_end|>"
    whole = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    cases: tuple[tuple[Any, Any, str], ...] = (
        (functions, named, '{"name": "weather", "arguments":'),
        (functions[:1], "required", '{"name": "weather", "arguments":'),
        (functions, "required", '{"name":'),
    )
    with serving(checkpoint(tmp_path), make_engine=Scripted) as server:
        for tools, choice, begun in cases:

            def rest(prompt: tuple[int, ...], begun: str = begun) -> list[int]:
                prompts.append(prompt)
                return said(whole.removeprefix(begun), end, "no")

            monkeypatch.setattr(Scripted, "script", staticmethod(rest))
            asked: dict[str, Any] = {"model": "run/sft", "messages": [{"role": "user", "content": "Rain?"}], "n": 2}
            answer = server.client.chat.completions.create(tools=tools, tool_choice=choice, stream=stream, **asked)
            if stream:
                chunks = [chunk.choices[0] for chunk in answer]
                calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
                assert not any(chunk.delta.content for chunk in chunks)
            else:
                calls = [call for one in answer.choices for call in one.message.tool_calls]
                assert {one.finish_reason for one in answer.choices} == {"tool_calls"}
                assert answer.usage.completion_tokens == 2 * len(said(begin, begun, whole.removeprefix(begun), end))
                assert answer.usage.prompt_tokens == len(prompts[-1]) - len(said(begin, begun))
            assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
                ("weather", {"city": "Oslo"})
            ] * 2
            assert list(prompts[-1])[-len(said(begin, begun)) - 1 :] == said("<|assistant_start|>", begin, begun)
