"""Clients and tools that take too long: they are cut off, and nobody waits for them."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from exports import tokenizer
from serving import ASKED, JSON, LONG, Breakable, Live, checkpoint, serving, wait_for

from jaxchat.decode import sample
from jaxchat.serve import completions, connections, daemon_threads

pytestmark = pytest.mark.filterwarnings("default")
BIAS = {str(tokenizer().specials[name]): 50 for name in ("<|python_start|>", "<|python_end|>")}
CALLING: dict[str, Any] = {"messages": ASKED, "logit_bias": BIAS, "max_tokens": 40, "seed": 1, **LONG}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(checkpoint(tmp_path_factory.mktemp("run")), make_engine=Breakable) as server:
        server.client.chat.completions.create(model="run/sft", messages=ASKED, max_tokens=20, extra_body=LONG)
        yield server


def test_a_slow_reader_delays_nobody(live: Live) -> None:
    with live.http.stream("POST", "/v1/chat/completions", json={"messages": ASKED, "stream": True, **LONG}) as slow:
        lines = slow.iter_lines()
        next(lines)
        assert live.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 8}).status_code == 200
        assert sum(line == "data: [DONE]" for line in lines) == 1


@pytest.mark.parametrize("upgrade", [False, True])
def test_a_client_that_never_reads_is_cut(live: Live, upgrade: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.5)
    body: dict[str, Any] = {"messages": ASKED, "n": 4, "stream": True, "logprobs": True, "top_logprobs": 20, **LONG}
    text = json.dumps({"type": "chat", **body} if upgrade else body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(text)}\r\n"
    if upgrade:
        head = "GET /ws/chat HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        head += f"sec-websocket-version: 13\r\nsec-websocket-key: {'A' * 22}==\r\n"
        text = b"\x81\xfe" + len(text).to_bytes(2, "big") + bytes(4) + text  # One frame, masked with zeros.
    host, port = live.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode())
        assert not upgrade or connection.recv(4096).startswith(b"HTTP/1.1 101")
        connection.sendall(text)
        assert wait_for(lambda: bool(live.model.users)), "the request has begun"
        assert live.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 8}).status_code == 200
        assert live.idle(10.0)


def test_a_tool_that_takes_long_delays_nobody(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, done = threading.Event(), threading.Event()

    def slow(self: Any, call: str) -> str | None:
        entered.set()
        done.wait(20)
        return "42"

    monkeypatch.setattr(completions.Functions, "__call__", slow)
    found: list[Any] = []
    calling = threading.Thread(target=lambda: found.append(live.http.post("/v1/chat/completions", json=CALLING)))
    calling.start()
    try:
        assert entered.wait(20)
        with httpx.Client(base_url=live.url, timeout=10) as http:
            assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 8}).status_code == 200
        assert not found, "its tool is still running"
    finally:
        done.set()
        calling.join()
    assert {"type": "python_output", "text": "42"} in found[0].json()["choices"][0]["message"]["parts"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_tool_that_hangs_fails_its_request_alone(live: Live, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(sample, "TOOL_SECONDS", 0.3)
    monkeypatch.setattr(completions.Functions, "__call__", lambda self, call: never.wait())
    body = {**CALLING, "stream": stream}
    try:
        for _ in range(6):  # More than there are slots.
            answer = live.http.post("/v1/chat/completions", json=body)
            assert answer.status_code == (200 if stream else 500)
            assert "the tool Functions gave no answer within 0.3 s" in answer.text and live.idle()
        hanging = [thread for thread in threading.enumerate() if thread.name == "daemon"]
        assert len(hanging) == 6 and all(thread.daemon for thread in hanging), "they do not delay the process' end"
        assert live.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 8}).status_code == 200
    finally:
        never.set()


def test_a_tool_that_hangs_does_not_delay_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, never = threading.Event(), threading.Event()

    def hang(self: Any, call: str) -> None:
        entered.set()
        never.wait()

    monkeypatch.setattr(completions.Functions, "__call__", hang)
    body = {**CALLING, "stream": True}
    try:
        with serving(checkpoint(tmp_path)) as server, server.http.stream("POST", "/v1/chat/completions", json=body):
            assert entered.wait(20)
            start = time.monotonic()
        assert time.monotonic() - start < 20, "drain_seconds is 1"
    finally:
        never.set()


def test_too_many_tools_that_hang_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_threads, "MOST_RUNNING", 1)
    threads, done = daemon_threads.DaemonThreads(), threading.Event()
    first = threads.submit(done.wait)
    with pytest.raises(RuntimeError, match="1 threads are running already"):
        threads.submit(str).result(5)
    done.set()
    assert first.result(5) is True
    assert wait_for(lambda: not threads.submit(str).exception(5)), "there is room again"


SLOW: dict[str, bytes] = {
    "nothing": b"",
    "half a head": b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n",
    "half a second head": b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /health HTTP/1.1\r\n",
    "half a body": b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n"
    b'content-type: application/json\r\n\r\n{"prompt": ',
}


@pytest.mark.parametrize("name", SLOW)
def test_a_request_that_never_ends_is_cut(live: Live, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(SLOW[name])
        received = b""
        with contextlib.suppress(ConnectionError):  # The end of the connection.
            while data := connection.recv(4096):
                received += data
                with contextlib.suppress(OSError):
                    connection.sendall(b" ")  # One more byte does not help.
    assert (b" 408 " in received) == (name == "half a body"), received
    assert b"the body did not arrive within 0.5 s" in received or name != "half a body"
    assert live.idle() and live.http.get("/health").status_code == 200


def test_a_slow_body_and_an_idle_websocket_are_not_cut(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    from websockets.sync.client import connect

    monkeypatch.setattr(connections, "READ_SECONDS", 1.0)
    text = json.dumps({"prompt": "a", "max_tokens": 30, **LONG}).encode()

    def slowly() -> Iterator[bytes]:
        for part in (text[:5], text[5:]):
            time.sleep(0.3)
            yield part

    monkeypatch.setattr(Breakable, "pause", 0.3)  # The answer takes longer than a body may.
    with connect(live.url.replace("http", "ws") + "/ws/chat") as talking:
        answer = live.http.post("/v1/completions", content=slowly(), headers=JSON)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 30
        talking.send(json.dumps({"type": "chat", "messages": ASKED, "max_tokens": 2, **LONG}))
        assert json.loads(talking.recv(20))["type"] == "chunk"
