"""launch.serve as a process: mistakes, start, an orderly end; and what others' programs say of the API."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jax
import numpy as np
import pytest
import uvicorn
from runs import finish, last_of_each
from runs import launch as start
from serving import LENGTH, Live, checkpoint, serving

import launch.serve as command
from jaxchat.decode.engine import EngineConfig
from jaxchat.errors import UserError
from jaxchat.evaluation import harness
from jaxchat.loading import load_checkpoint
from jaxchat.serve.app import Server
from jaxchat.serve.models import model_bytes

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def live(run: str) -> Iterator[Live]:
    with serving(run, queue=1000) as server:
        yield server


def test_a_bad_start_is_one_sentence(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(*arguments: str) -> str:
        with pytest.raises(UserError) as caught:
            command.main(list(arguments))
        return str(caught.value)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} is in use: choose another" in refusal(f"--checkpoint={run}", f"--port={port}")
    assert "no checkpoint in" in refusal(f"--checkpoint={tmp_path}/nothing")
    assert "no checkpoint 7 in" in refusal(f"--checkpoint={run}@7")
    assert "set --api_key, or --allow_anyone" in refusal(f"--checkpoint={run}", "--host=0.0.0.0")
    assert "there is no model x: there are" in refusal(f"--checkpoint={run}", "--default_model=x")
    assert "unknown tool 'x'" in refusal(f"--checkpoint={run}", "--tools", "x")
    assert "--checkpoint is missing: give it as --checkpoint=STR;" in refusal()
    for wrong in ("--slots=0", "--steps=0", "--queue=-1", "--drain_seconds=nan", "--allow_origins=a.b"):
        assert f"{wrong[2:]} must be" in refusal(f"--checkpoint={run}", wrong)
    shutil.copytree(Path(run).parent, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/tokenizer")
    assert "no tokenizer in" in refusal(f"--checkpoint={tmp_path}/run/sft")
    assert "two checkpoints would be named run/sft@0" in refusal("--checkpoint", run, f"{tmp_path}/run/sft")
    monkeypatch.delattr("jaxchat.serve.app")
    monkeypatch.setitem(sys.modules, "jaxchat.serve.app", None)
    assert "pip install -e '.[serve]'" in refusal(f"--checkpoint={run}")


REMEDIES = [
    ("--host=0.0.0.0 --port=0", "set --api_key, or --allow_anyone=True", "--api_key=key"),
    ("--host=0.0.0.0 --port=0", "set --api_key, or --allow_anyone=True", "--allow_anyone=True"),
    ("--host=127.0.0.256 --api_key=key --port=99999", "set --host and --port", "--host=127.0.0.1 --port=0"),
    ("--port={taken}", "choose another with --port, or 0 for any", "--port=0"),
    ("--port=0 --model_bytes=9", "but the limit is 9: set --model_bytes={size}", "--model_bytes={size}"),
]


@pytest.mark.parametrize(("given", "said", "advised"), REMEDIES)
def test_what_a_refusal_advises_starts_the_server(
    run: str, given: str, said: str, advised: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []
    monkeypatch.setattr("jaxchat.serve.app.Server.run", lambda server, sockets: served.extend(sockets))
    found = load_checkpoint(run)
    shape = EngineConfig(length=LENGTH, slots=16, prefix_cache_bytes=256 << 20)
    size = model_bytes(found, shape)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"taken": taken.getsockname()[1], "size": size}
        with pytest.raises(UserError, match=re.escape(said.format(**names))):
            command.main([f"--checkpoint={run}", *given.format(**names).split()])
        assert not served
        command.main(last_of_each([f"--checkpoint={run}", *f"{given} {advised}".format(**names).split()]))
    served.pop().close()


def test_sigterm_loses_no_answer_under_way_and_refuses_what_comes(run: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = launch_serve(run, f"--port={port}")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            ready(http)
            body = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True, "top_k": 20}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                late = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "a"})
                assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down"
                text = [line for line in lines if line]
            assert text[-1] == "data: [DONE]"
            reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in text[:-1]]
            assert reasons[-1] == "length"
        out, err = finish(process)
        assert json.loads(out.splitlines()[-1])["answers"] == 1
        assert "finishing the answers under way" in err
    finally:
        process.kill()


SLOW_START = """
import os, runpy, signal, sys, time
from jaxchat.serve import app, models
if sys.argv.pop() == "early":
    find = app.find_models
    app.find_models = lambda paths: os.kill(os.getpid(), signal.SIGTERM) or find(paths)
models.warm = lambda engine: (print("compiling", file=sys.stderr, flush=True), time.sleep(1000))
runpy.run_module("launch.serve", run_name="__main__")
"""


@pytest.mark.parametrize("when", ["early", "while it compiles"])
def test_a_signal_ends_a_server_that_is_not_ready(run: str, when: str) -> None:
    command = [sys.executable, "-c", SLOW_START, f"--checkpoint={run}", "--port=0", when]
    process = start(command=command)
    try:
        if when != "early":
            assert any("compiling" in line for line in process.stderr)
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and json.loads(out)["answers"] == 0, err
    finally:
        process.kill()


def test_a_second_signal_waits_for_nothing() -> None:
    busy = SimpleNamespace(loaded={"a model": SimpleNamespace(users=1)})
    app: Any = SimpleNamespace(state=SimpleNamespace(models=busy, draining=False))
    server = Server(uvicorn.Config(app, lifespan="off"), app, drain_seconds=1000.0)
    server.force_exit, server.servers = False, []
    server.handle_exit(signal.SIGTERM, None)
    assert app.state.draining and server.should_exit and not server.force_exit
    server.handle_exit(signal.SIGTERM, None)
    asyncio.run(server.shutdown())


def launch_serve(run: str, *arguments: str) -> subprocess.Popen[str]:
    return start(f"--checkpoint={run}", "--warm=False", "--steps=2", *arguments, program="launch.serve")


def ready(http: httpx.Client, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if http.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the server did not get ready")


def test_local_completions_of_lm_eval_score_as_our_adapter(live: Live, run: str, tmp_path: Path) -> None:
    """50 items: 40 likelihoods, and 10 answers."""
    pytest.importorskip("lm_eval.models.openai_completions")
    pytest.importorskip("aiohttp")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    random = np.random.default_rng(0)
    words = ["fox", "bear", "tree", "water", "bird", "song", "17", "나는", "old"]
    said = lambda count: " ".join(random.choice(words, count))  # noqa: E731
    pairs = [(said(random.integers(0, 30)), " " + said(random.integers(1, 4))) for _ in range(40)]
    settings: dict[str, Any] = {"do_sample": False, "until": ["\n", "e"], "max_gen_toks": 12, "temperature": 0.0}
    contexts = [(said(5), dict(settings)) for _ in range(10)]
    url = {"base_url": f"{live.url}/v1/completions", "model": "run/sft", "max_length": 256, "num_concurrent": 4}
    theirs = LocalCompletionsAPI(**url, tokenizer_backend="remote", batch_size=2)
    adapter = harness.load(run)

    def asked(kind: str, arguments: list[Any]) -> list[Instance]:
        return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]

    ours = adapter.loglikelihood(asked("loglikelihood", pairs))
    found = theirs.loglikelihood(asked("loglikelihood", pairs))
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in ours], rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in ours]
    texts = theirs.generate_until(asked("generate_until", contexts))
    assert texts == adapter.generate_until(asked("generate_until", contexts))
    assert live.idle()


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_schemathesis_finds_no_5xx(live: Live, mode: str) -> None:
    program = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("schemathesis is not installed")
    options = ["--phases=coverage,fuzzing", "--checks=not_a_server_error", "--max-examples=20", "--seed=1"]
    options += ["--generation-allow-x00=true", f"--mode={mode}", "--no-color", "--suppress-health-check=all"]
    options += ["--request-timeout=200"]  # A program may be compiled meanwhile.
    command_line = [program, "run", f"{live.url}/openapi.json", *options]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert live.http.get("/ready").status_code == 200 and live.idle()


@pytest.mark.slow
def test_nothing_is_compiled_after_the_start(tmp_path: Path) -> None:
    with serving(checkpoint(tmp_path, depth=1), warm=True, slots=2) as server:
        events: list[str] = []
        note = lambda event, seconds, **about: events.append(event) if "compile" in event else None  # noqa: E731
        jax.monitoring.register_event_duration_secs_listener(note)
        try:
            talk: list[Any] = []
            for turn in range(4):
                talk.append({"role": "user", "content": "small birds sang " * (turn + 1)})
                for more in ({}, {"top_p": 0.9}, {"temperature": 0}, {"logprobs": True, "top_logprobs": 3}):
                    done = server.client.chat.completions.create(
                        model="run/sft", messages=talk, max_tokens=12, n=1 + turn % 2, presence_penalty=turn % 2, **more
                    )
                talk.append({"role": "assistant", "content": done.choices[0].message.content or "x"})
            for size in (1, 9, 70, 200):
                server.client.completions.create(model="run/sft", prompt=[40] * size, logprobs=1, echo=True)
        finally:
            jax.monitoring.unregister_event_duration_listener(note)
        assert not events
