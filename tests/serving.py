"""A live server in a thread, with a small random model, for tests."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
from exports import model, write_run

from jaxchat.decode.engine import Engine
from jaxchat.serve.app import create_app, create_server
from jaxchat.serve.models import find_models
from launch.serve import Serve

LENGTH = 256
ASKED = [{"role": "user", "content": "small birds sang"}]
LONG: dict[str, Any] = {"ignore_eos": True, "top_k": 20}
JSON = {"content-type": "application/json"}


def checkpoint(directory: Path, **changes: Any) -> str:
    return write_run(directory, model(head_std=0.1, **changes), length=LENGTH, scale=0.4)


class Live:
    """A server; `get` and `post` are plain HTTP, `client` is OpenAI's."""

    def __init__(self, app: Any, url: str, key: str) -> None:
        self.app, self.url = app, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=url, timeout=60)

    @property
    def model(self) -> Any:
        return next(reversed(self.app.state.models.loaded.values()))

    @property
    def engine(self) -> Any:
        return self.model.worker.engine

    def idle(self, seconds: float = 5.0) -> bool:
        """Whether no answer has a slot or waits, now or soon."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            worker, engine = self.model.worker, self.engine
            if not (worker.pending or self.model.users or engine.slots.active or engine._waiting):
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def serving(path: str, *, wait: bool = True, make_engine: Any = None, **changes: Any) -> Iterator[Live]:
    settings = {
        "slots": 4,
        "model_bytes": 1 << 30,
        "prefix_bytes": 1 << 24,
        "warm": False,
        "drain_seconds": 1.0,
    } | changes
    options = Serve(checkpoint=(path,), **settings)
    more = {} if make_engine is None else {"make_engine": make_engine}
    app = create_app(options, find_models(options.checkpoint), **more)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # A client that does not read is soon noticed.
    server = create_server(app, log_level="warning")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    live = Live(app, url, options.api_key)
    try:
        end = time.monotonic() + 120
        while wait and live.http.get("/ready", headers=_key(options.api_key)).status_code != 200:
            assert time.monotonic() < end, app.state.starting
            time.sleep(0.05)
        yield live
    finally:
        live.http.close()
        live.client.close()
        server.should_exit = True
        thread.join(30)
        listening.close()


def _key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


class Breakable(Engine):
    """Raises while a sample is decoded whose prompt has `poison`."""

    poison = -1
    pause = 0.0
    count = 0  # Of steps.

    def step(self, **options: Any) -> bool:
        time.sleep(self.pause)
        Breakable.count += 1
        more = super().step(**options)
        if any(self.poison in sample.prompt for sample in self.slots.active):
            raise RuntimeError("out of memory")
        return more


def wait_for(happens: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not happens() and time.monotonic() < end:
        time.sleep(0.01)
    return happens()
