"""OpenAI's own client against a live server; answers equal to the engine's."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from exports import tokenizer
from pydantic import ValidationError
from serving import Live, checkpoint, serving

from jaxchat.decode.explain import explain
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import FILTERS, SamplingParams
from jaxchat.serve import protocol
from jaxchat.tokenizer import chat

# uvicorn, websockets and openai are not ours to keep free of warnings.
pytestmark = pytest.mark.filterwarnings("default")
ASKED = [{"role": "user", "content": "small birds sang"}]
# Few candidates, so that no special token is drawn, whose text would be in `parts`.
SEEDED: dict[str, Any] = {"model": "run/sft", "seed": 7, "temperature": 0.9, "extra_body": {"top_k": 20}}
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "seed": 7}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(checkpoint(tmp_path_factory.mktemp("run"))) as server:
        yield server


def prompt(messages: Any = ASKED) -> list[int]:
    return chat.render(messages, tokenizer(), complete=True).ids


def ours(live: Live, ids: list[int], n: int = 1, **params: Any) -> Any:
    """The engine's own answers."""
    assert live.idle()
    return live.engine.generate([Request(ids, SamplingParams(**params), n=n)])[0]


def test_a_seeded_chat_is_the_engines_answer_streamed_or_not(live: Live) -> None:
    (expected,) = ours(live, prompt(), **DRAWN, max_tokens=40)
    whole = live.client.chat.completions.create(messages=ASKED, max_tokens=40, **SEEDED)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage.completion_tokens == len(expected.tokens) and whole.usage.prompt_tokens == len(prompt())
    options = {"include_usage": True}
    chunks = list(
        live.client.chat.completions.create(
            messages=ASKED, max_completion_tokens=40, stream=True, stream_options=options, **SEEDED
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected.text
    assert sum(bool(c.choices[0].delta.content) for c in chunks[:-1]) > 1, "it comes in pieces"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert live.idle()


def test_a_chat_format_without_tools_answers_without_them(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dataclasses.replace(live.engine.tokenizer.chat_format, parts={})
    monkeypatch.setattr(live.engine.tokenizer, "chat_format", plain)
    answer = live.client.chat.completions.create(messages=ASKED, max_tokens=4, **SEEDED)
    assert answer.usage.completion_tokens == 4


def test_a_fresh_seed_is_returned_and_repeats_the_answer(live: Live) -> None:
    ask = lambda **more: live.client.completions.create(model="run/sft", prompt="small", max_tokens=20, **more)  # noqa: E731
    one, other = ask(), ask()
    assert one.seed != other.seed and one.choices[0].text != other.choices[0].text
    assert ask(seed=one.seed).choices[0].text == one.choices[0].text


def test_greedy_completions_of_every_kind_of_prompt(live: Live) -> None:
    ids = tokenizer().encode("the old bear")
    (expected,) = ours(live, [tokenizer().bos, *ids], temperature=0.0, max_tokens=12)
    for given in ("the old bear", ids, ["the old bear"], [ids], [tokenizer().bos, *ids]):
        done = live.client.completions.create(model="run/sft", prompt=given, temperature=0, max_tokens=12)
        assert done.choices[0].text == expected.text
    two = live.client.completions.create(
        model="run/sft", prompt=["a", "the old bear"], temperature=0, max_tokens=12, echo=True, n=2
    )
    assert [c.index for c in two.choices] == [0, 1, 2, 3]
    assert two.choices[2].text == two.choices[3].text == "the old bear" + expected.text


def test_three_samples_are_the_engines_three(live: Live) -> None:
    expected = ours(live, prompt(), n=3, **DRAWN, max_tokens=16)
    done = live.client.chat.completions.create(messages=ASKED, max_tokens=16, n=3, **SEEDED)
    assert [c.message.content for c in done.choices] == [answer.text for answer in expected]
    assert done.usage.prompt_tokens == len(prompt())


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_before_it(live: Live, stream: bool) -> None:
    (free,) = ours(live, prompt(), **DRAWN, max_tokens=60)
    stop = free.text[12:15]
    assert len(stop) == 3 and "�" not in stop
    done = live.client.chat.completions.create(messages=ASKED, max_tokens=60, stop=stop, stream=stream, **SEEDED)
    text = "".join(c.choices[0].delta.content or "" for c in done) if stream else done.choices[0].message.content
    assert text == free.text[: free.text.index(stop)]


def test_chat_logprobs_are_those_of_explain_and_sum_to_the_engines(live: Live) -> None:
    (expected,) = ours(live, prompt(), **DRAWN, max_tokens=12)
    asked = dict(messages=ASKED, max_tokens=12, logprobs=True, top_logprobs=5, **SEEDED)
    whole = live.client.chat.completions.create(**asked)
    streamed = live.client.chat.completions.create(**asked, stream=True)
    entries = whole.choices[0].logprobs.content
    assert [e for c in streamed if c.choices[0].logprobs for e in c.choices[0].logprobs.content] == entries
    sampled = [p for token, p in zip(expected.tokens, expected.logprobs) if token not in live.engine.ends]
    np.testing.assert_allclose(sum(e.logprob for e in entries), sum(sampled), atol=1e-4)
    assert b"".join(bytes(e.bytes) for e in entries).decode(errors="replace") == expected.text
    steps = explain(live.engine, prompt(), expected.tokens, SamplingParams(**DRAWN), count=5)
    for entry, candidates in zip(entries, steps):
        assert len(entry.top_logprobs) == 5
        found = [np.exp(top.logprob) for top in entry.top_logprobs]
        np.testing.assert_allclose(found, [c.probabilities["model"] for c in candidates[:5]], atol=1e-5)


def test_completion_logprobs_with_echo_score_the_prompt(live: Live) -> None:
    ids = tokenizer().encode("small birds sang 나는")
    done = live.client.completions.create(
        model="run/sft", prompt=ids, temperature=0, max_tokens=4, logprobs=2, echo=True
    )
    logprobs = done.choices[0].logprobs
    assert done.choices[0].text.startswith("small birds sang 나는")
    logits = live.engine.forward([tokenizer().bos, *ids]).astype(np.float64)
    expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    np.testing.assert_allclose(logprobs.token_logprobs[: len(ids)], expected[np.arange(len(ids)), ids], atol=1e-4)
    for own, top in zip(logprobs.token_logprobs, logprobs.top_logprobs):
        assert own in top.values() and own <= max(top.values()) and 2 <= len(top) <= 3
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset[len(ids)] == len("small birds sang 나는")
    scored = live.client.completions.create(model="run/sft", prompt=ids, max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].text == "small birds sang 나는" and scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[: len(ids)]


def test_a_second_turn_reuses_the_first(live: Live) -> None:
    first = live.client.chat.completions.create(messages=ASKED, max_tokens=10, **SEEDED)
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    turn = [*ASKED, answer, {"role": "user", "content": "and then?"}]
    second = live.client.chat.completions.create(messages=turn, max_tokens=10, **SEEDED)
    assert second.usage.prompt_tokens_details.cached_tokens >= len(prompt())


def test_a_demanded_call_is_what_the_engine_says_after_its_beginning(live: Live) -> None:
    tools = [{"type": "function", "function": {"name": "rain"}}]
    asked: dict[str, Any] = {"messages": ASKED, "max_tokens": 60, "tools": tools, **SEEDED}
    done = live.client.chat.completions.create(tool_choice=tools[0], **asked)
    words, text = tokenizer(), '{"name": "rain", "arguments":'
    begun = [words.specials["<|python_start|>"], *words.encode(text)]
    described = [
        {
            "role": "user",
            "content": f"You can call these tools:\n{json.dumps({'name': 'rain'})}\n\n" + "small birds sang",
        }
    ]
    (expected,) = ours(live, [*prompt(described), *begun], **DRAWN, max_tokens=60 - len(begun))
    part = done.choices[0].message.parts[0]
    assert part["type"] == "python" and part["text"] == text + expected.text
    assert done.usage.completion_tokens == len(begun) + len(expected.tokens)
    with pytest.raises(openai.BadRequestError, match="more than the"):
        live.client.chat.completions.create(tool_choice="required", **asked | {"max_tokens": 5})
    assert done.usage.prompt_tokens == len(prompt(described))


def test_every_filter_of_the_engine_is_a_field() -> None:
    given = {"top_k": 3, "top_p": 0.5, "min_p": 0.25}
    params = protocol.Completion(**given).params(seed=0, max_tokens=1)
    assert given.items() <= params.truncation.items() and FILTERS.keys() <= protocol.Chat.model_fields.keys()
    assert not protocol.Completion(top_k=-1).params(seed=0, max_tokens=1).truncates
    for name, row in FILTERS.items():
        with pytest.raises(ValidationError, match=name):
            protocol.Completion(**{name: row.limits[0] - 2})


def test_penalties_and_bias_are_the_engines(live: Live) -> None:
    params = {"temperature": 0.0, "presence_penalty": -1.0, "frequency_penalty": 0.5}
    (expected,) = ours(live, prompt(), **params, logit_bias={40: 5.0}, max_tokens=12)
    done = live.client.chat.completions.create(
        model="run/sft", messages=ASKED, max_tokens=12, logit_bias={"40": 5}, **params
    )
    assert done.choices[0].message.content == expected.text


def failure(live: Live, kind: type[openai.APIStatusError], **asked: Any) -> dict[str, Any]:
    with pytest.raises(kind) as caught:
        live.client.chat.completions.create(**{"model": "run/sft", "messages": ASKED} | asked)
    body = caught.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


def test_errors_have_openais_shapes(live: Live) -> None:
    long = [{"role": "user", "content": "small birds " * 200}]
    assert "the context has 256" in failure(live, openai.BadRequestError, messages=long)["message"]
    assert failure(live, openai.NotFoundError, model="nobody")["param"] == "model"
    assert failure(live, openai.UnprocessableEntityError, temperature=-1)["param"] == "temperature"
    assert failure(live, openai.UnprocessableEntityError, seed=-1)["param"] == "seed"
    assert failure(live, openai.UnprocessableEntityError, n=10**9)["param"] == "n"
    assert failure(live, openai.UnprocessableEntityError, extra_body={"colour": 1})["param"] == "colour"
    assert "user" in failure(live, openai.BadRequestError, messages=[{"role": "system", "content": "x"}])["message"]
    big = failure(live, openai.APIStatusError, messages=[{"role": "user", "content": "x" * 1_100_000}])
    assert "larger than 1000000 bytes" in big["message"]
    broken = live.http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400 and broken.json()["error"]["message"] == "the body is not JSON"
    plain = live.http.post("/v1/chat/completions", content=b'{"messages": []}', headers={"content-type": "text/plain"})
    assert plain.status_code == 422 and "Content-Type: application/json" in plain.json()["error"]["message"]
    assert live.http.get("/v1/models/../../etc/passwd").status_code == 404
    for choice in ("required", {"type": "function", "function": {"name": "rain"}}):
        assert failure(live, openai.BadRequestError, tool_choice=choice)["param"] == "tool_choice"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"prompt": ["a"] * 65}, "prompt", "at most 64 items"),
        ({"prompt": [[5, -1]]}, "prompt.0.1", "greater than or equal to 0"),
        ({"prompt": "a", "stop": ["a", ""]}, "stop.1", "at least 1 character"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.text", "required"),
        ({"messages": ASKED, "tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
    ],
)
def test_a_mistake_in_a_field_of_several_types_is_that_of_the_type_meant(
    live: Live, body: dict[str, Any], param: str, said: str
) -> None:
    found = live.http.post("/v1/chat/completions" if "messages" in body else "/v1/completions", json=body)
    error = found.json()["error"]
    assert found.status_code == 422 and error["param"] == param
    assert error["message"].startswith(f"{param}: ") and said in error["message"]


def test_models_tokenize_and_information(live: Live) -> None:
    assert [m.id for m in live.client.models.list()] == ["run/sft@0", "run/sft"]
    assert live.client.models.retrieve("run/sft@0").id == "run/sft@0"
    text = "small 나는 � \0"
    told = live.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert told["tokens"] == tokenizer().encode(text) and told["max_model_len"] == 256
    assert live.http.post("/detokenize", json={"tokens": told["tokens"]}).json()["prompt"] == text
    assert live.http.post("/tokenize", json={"messages": ASKED}).json()["tokens"] == prompt()
    info = live.http.get("/tokenizer_info").json()
    assert live.http.post("/tokenize", json={"prompt": info["eos_token"]}).json()["tokens"] == [tokenizer().end]
    assert live.http.get("/health").json() == {"status": "ok"} and live.http.get("/ready").json()["ready"]


def test_metrics_are_read_by_prometheus_own_parser(live: Live) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    live.client.completions.create(model="run/sft", prompt="a", max_tokens=3)
    families = {f.name: f for f in text_string_to_metric_families(live.http.get("/metrics").text)}
    tokens = {s.labels["kind"]: s.value for s in families["jaxchat_tokens"].samples if s.name.endswith("_total")}
    assert tokens["answer"] >= 3 and tokens["prompt"] >= 2
    assert families["jaxchat_loaded_models"].samples[0].value == 1


def test_a_chat_over_a_websocket_is_cancelled_in_the_middle(live: Live) -> None:
    from websockets.sync.client import connect

    url = live.url.replace("http", "ws") + "/ws/chat"
    with connect(url) as socket:
        socket.send(json.dumps({"type": "chat", "messages": ASKED, "ignore_eos": True, **DRAWN}))
        messages = [json.loads(socket.recv())]
        socket.send('{"type": "cancel"}')
        while messages[-1]["type"] == "chunk":
            messages.append(json.loads(socket.recv()))
        assert messages[-1]["type"] == "done" and messages[-1]["finish_reason"] == "cancelled"
        assert messages[-1]["usage"]["completion_tokens"] < 150
        for words in ({"type": "chat", "messages": ASKED, "ignore_eos": True}, {"type": "cancel"}):
            socket.send(json.dumps(words))  # It is cancelled before it has a slot.
        while (message := json.loads(socket.recv(10)))["type"] == "chunk":
            pass
        assert message["type"] == "done" and message["finish_reason"] == "cancelled"
        for mistake in ('{"type": "sing"}', "[", '{"type": "chat", "messages": []}'):
            socket.send(mistake)
            assert json.loads(socket.recv())["type"] == "error"
        socket.send(json.dumps({"type": "chat", "messages": ASKED, "max_tokens": 3, **DRAWN}))
        while (message := json.loads(socket.recv()))["type"] == "chunk":
            pass
        assert message["type"] == "done" and message["finish_reason"] == "length"
    assert live.idle()
