"""Clients that leave, requests that are poison, engines that raise, keys and origins, models that take turns."""

import base64
import dataclasses
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import pytest
from exports import model, tokenizer, write_run
from serving import ASKED, JSON, LENGTH, LONG, Breakable, Live, checkpoint, serving, wait_for

from jaxchat.serve import limits
from jaxchat.serve.errors import ApiError

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(checkpoint(tmp_path_factory.mktemp("run")), make_engine=Breakable) as server:
        server.client.chat.completions.create(model="run/sft", messages=ASKED, max_tokens=20, extra_body=LONG)
        yield server


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(live: Live, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breakable, "pause", 0.1)
    body = json.dumps({"messages": ASKED, "stream": stream, **LONG}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        assert wait_for(lambda: bool(live.engine.slots.active))
        before = Breakable.count
    assert live.idle(20.0)
    assert Breakable.count - before < 10, "within a chunk or two, where the machine is idle; the whole answer takes 30"


def test_a_client_that_leaves_before_its_turn_is_forgotten(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breakable, "pause", 0.05)
    with httpx.Client(base_url=live.url) as http:
        for stream in (True, False) * 4:
            with pytest.raises(httpx.TimeoutException):
                http.post("/v1/chat/completions", json={"messages": ASKED, "stream": stream, **LONG}, timeout=0.02)
    assert live.idle(3.0)
    assert live.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_an_engine_that_raises_fails_the_culprit_alone(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["small birds", "the old bear", "water", "a fox"]
    ask = lambda text, **more: live.http.post(  # noqa: E731
        "/v1/completions", json={"prompt": text, "seed": 3, "max_tokens": 60, **LONG, **more}
    )
    alone = [ask(text).json()["choices"][0]["text"] for text in words]
    poison = tokenizer().encode("ß")[0]
    assert not any(poison in tokenizer().encode(text) for text in words)
    monkeypatch.setattr(Breakable, "poison", poison)
    found: dict[str, Any] = {}
    threads = [threading.Thread(target=lambda text=text: found.update({text: ask(text)})) for text in [*words, "ß"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["ß"].status_code == 500 and found["ß"].json()["error"]["code"] == "engine_error"
    assert [found[text].json()["choices"][0]["text"] for text in words] == alone
    with pytest.raises(openai.APIError, match="failed with this request"):
        list(live.client.completions.create(model="run/sft", prompt="ß", max_tokens=60, stream=True, extra_body=LONG))
    assert live.idle() and ask("water").status_code == 200


POISON: dict[str, tuple[Any, int]] = {
    "2 MB": (b'{"messages": [{"role": "user", "content": "' + b"x" * 2_000_000 + b'"}]}', 413),
    "10,000 messages": ({"messages": ASKED * 10_000}, 422),
    "invalid UTF-8": (b'{"messages": [{"role": "user", "content": "\xff"}]}', 400),
    "deep": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "deep metadata": (b'{"messages": [], "metadata": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}", 400),
    "NaN": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 422),
    "infinite": (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 422),
    "a list": ([1], 422),
    "null": (b"null", 422),
    "nothing": (b"", 422),
    "huge n": ({"messages": ASKED, "n": 10**30}, 422),
    "negative seed": ({"messages": ASKED, "seed": -1}, 422),
    "true as a number": ({"messages": ASKED, "max_tokens": True}, 422),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, 422),
    "two system messages later": ({"messages": [*ASKED, {"role": "system", "content": "x"}]}, 400),
    "parts of the user": ({"messages": [ASKED[0] | {"parts": [{"type": "text", "text": "x"}]}]}, 400),
    "a lone surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}', 200),
    "a lone surrogate as a name": (b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 2}', 422),
    "a lone surrogate as a model": (b'{"messages": [{"role": "user", "content": "a"}], "model": "\\ud800"}', 422),
    "ids out of range": ({"prompt": [99999]}, 400),
    "an id of a bias out of range": ({"prompt": "a", "logit_bias": {"99999": 1}}, 400),
    "NUL": ({"messages": [{"role": "user", "content": "a\0b"}], "max_tokens": 2, "stop": "\0"}, 200),
    "U+FFFD": ({"messages": [{"role": "user", "content": "� ▁"}], "max_tokens": 2}, 200),
    "half a character": ({"prompt": [*tokenizer().encode("㋿")[:-1]], "max_tokens": 4, "echo": True}, 200),
    "an empty prompt": ({"prompt": "", "max_tokens": 2}, 200),
    "no ids": ({"prompt": [[]], "max_tokens": 2}, 200),
}


@pytest.mark.parametrize("name", POISON)
def test_poisoned_requests_get_their_answer_and_the_server_goes_on(live: Live, name: str) -> None:
    body, status = POISON[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    path = "/v1/completions" if b'"prompt"' in content[:20] else "/v1/chat/completions"
    answer = live.http.post(path, content=content, headers=JSON)
    assert answer.status_code == status, answer.text[:300]
    assert ("error" in answer.json()) == (status != 200)
    assert live.http.get("/health").status_code == 200 and live.idle()


def test_a_full_queue_and_a_rate_answer_429(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breakable, "pause", 0.3)
    monkeypatch.setattr(limits, "now", lambda: 5.0)
    settings: dict[str, Any] = {"slots": 1, "queue": 1, "requests_per_minute": 5}
    with serving(checkpoint(tmp_path), make_engine=Breakable, **settings) as server:
        body = {"prompt": "a", "max_tokens": 200, "stream": True, **LONG}
        with (
            server.http.stream("POST", "/v1/completions", json=body) as one,
            server.http.stream("POST", "/v1/completions", json=body) as two,
        ):
            assert one.status_code == two.status_code == 200
            full = server.http.post("/v1/completions", json={"prompt": "a"})
            assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full"
            assert full.headers["retry-after"] == "1"
        assert server.idle()
        large = server.http.post("/v1/completions", json={"prompt": "a", "n": 3})
        assert large.status_code == 400 and "at most 2" in large.json()["error"]["message"]
        assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        fast = server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert fast.status_code == 429 and fast.headers["retry-after"] == "13"
        server.app.state.draining = True
        assert server.http.post("/v1/completions", json={"prompt": "a"}).status_code == 503
        assert server.http.get("/ready").status_code == 503 and server.http.get("/health").status_code == 200


def test_a_client_that_leaves_while_its_model_is_loaded_does_not_load_it_twice(tmp_path: Path) -> None:
    made: list[Any] = []
    go = threading.Event()

    def make(*parts: Any, **settings: Any) -> Breakable:
        made.append(parts)
        if len(made) > 1:
            go.wait(20)
        return Breakable(*parts, **settings)

    stages = [write_run(tmp_path, model(), stage=stage, length=LENGTH) for stage in ("pretrain", "sft")]
    body = {"model": "run/pretrain", "prompt": "a", "max_tokens": 2}
    with serving(str(Path(stages[0]).parent), make_engine=make) as server:
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                server.http.post("/v1/completions", json=body, timeout=0.5)
        threading.Timer(0.5, go.set).start()
        assert server.http.post("/v1/completions", json=body).status_code == 200
        assert len(made) == 2, "one of each model"


def test_a_mistake_of_ours_is_an_error_with_the_id_of_the_request(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    monkeypatch.setattr("jaxchat.serve.information._described", lambda *parts: 1 / 0)
    monkeypatch.setattr("jaxchat.serve.limits.LOG.exception", lambda said, extra: lines.append(extra["fields"]))
    found = live.http.get("/v1/models", headers={"x-request-id": "mine"})
    assert found.status_code == 500 and found.json()["error"]["code"] == "internal_error"
    assert found.headers["x-request-id"] == "mine" and lines == [{"request_id": "mine"}]
    assert 'path="/v1/models",status="500"' in live.http.get("/metrics").text


def test_a_checkpoint_that_is_removed_leaves_the_others(tmp_path: Path) -> None:
    with serving(checkpoint(tmp_path)) as server:
        models = server.http.get("/v1/models").json()
        tmp_path.rename(tmp_path.with_name("elsewhere"))
        assert server.http.get("/v1/models").json() == models
        assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_the_name_of_another_page_that_leads_here_is_refused(live: Live) -> None:
    answer = live.http.get("/v1/models", headers={"host": "evil.example:8000"})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"


def test_rates_are_kept_for_each_client() -> None:
    rates = limits.Rates(2)
    for client in ("a", "a", "b"):
        rates.take(client)
    with pytest.raises(ApiError, match="more than 2 requests"):
        rates.take("a")
    rates.take("b")


def test_a_key_may_have_any_letters() -> None:
    guard = limits.Guard(Mock(), Mock(options=Mock(api_key="ключ")))
    bearer, basic = "ключ".encode().decode("latin-1"), base64.b64encode("x:ключ".encode()).decode()
    assert guard._knows_key(f"Bearer {bearer}") and guard._knows_key(f"basic {basic}")
    assert not guard._knows_key("Bearer x") and not guard._knows_key(bearer)


def test_without_the_key_only_health_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    with serving(checkpoint(tmp_path), api_key="geheim", allow_origins=("https://ours.example",)) as server:
        monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [caplog.handler])
        paths = [("GET", path) for path in ("/", "/ready", "/metrics", "/openapi.json", "/v1/models", "/nowhere")]
        paths += [("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize")]
        for method, path in paths:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic !"}):
                answer = server.http.request(method, path, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/v1/models", auth=("anyone", "geheim")).status_code == 200
        assert [m.id for m in server.client.models.list()] == ["run/sft@0", "run/sft"]
        answer = server.http.get("/health", headers={"origin": "https://ours.example"})
        assert answer.headers["access-control-allow-origin"] == "https://ours.example"
        assert "script-src" not in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert (
            "access-control-allow-origin" not in server.http.get("/health", headers={"origin": "https://a.b"}).headers
        )
        assert server.http.get("/v1/models", headers={"host": "a.b"}).status_code == 401
        url, key = server.url.replace("http", "ws") + "/ws/chat", {"authorization": "Bearer geheim"}
        for headers, status in (({}, 401), (key | {"origin": "https://a.b"}, 403)):
            with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers=headers):
                pass
            assert refused.value.response.status_code == status
        for origin in ("https://ours.example", server.url):
            with connect(url, additional_headers=key, origin=origin):  # type: ignore[arg-type]
                pass
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], "a refusal is no error"


def test_three_models_take_turns_in_room_for_two(tmp_path: Path) -> None:
    for stage, scale in (("pretrain", 0.4), ("sft", 0.5), ("rl", 0.6)):
        write_run(tmp_path, model(head_std=0.1), stage=stage, length=LENGTH, scale=scale)
    engines = lambda: sum(thread.name.startswith("engine run/") for thread in threading.enumerate())  # noqa: E731
    before = engines()
    with serving(str(tmp_path / "run"), default_model="run/pretrain") as server:
        models = server.app.state.models
        models.options = dataclasses.replace(models.options, model_bytes=2 * models.bytes)
        names = ["run/pretrain", "run/sft", "run/rl"]

        def ask(name: str) -> str:
            return server.client.completions.create(model=name, prompt="a", seed=1, max_tokens=9).choices[0].text

        first = [ask(name) for name in names]
        assert len(set(first)) == 3 and len(models.loaded) == 2
        assert [m.entry.name for m in models.loaded.values()] == names[1:]
        ask("run/sft")
        assert ask("run/pretrain") == first[0]
        assert [m.entry.name for m in models.loaded.values()] == ["run/sft", "run/pretrain"]
        assert [ask(name) for name in names] == first
        assert engines() == before + 2
    assert engines() == before
