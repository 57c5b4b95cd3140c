"""The application, and the process that serves it: start, readiness, and an orderly end."""

import asyncio
import atexit
import contextlib
import dataclasses
import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from jaxchat import signals
from jaxchat.decode.tools import named_tools
from jaxchat.errors import UserError
from jaxchat.launcher import log
from jaxchat.serve import completions, information, inspect
from jaxchat.serve.connections import ImpatientHttp, ImpatientWebSocket
from jaxchat.serve.errors import ApiError, as_api_error
from jaxchat.serve.limits import Guard, JsonLines, Rates, is_loopback
from jaxchat.serve.metrics import Metrics
from jaxchat.serve.models import Models, find_models

LOG = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
THREADS = ("engine", "daemon")  # Names of threads that may be in XLA.


def create_app(options: Any, models: dict[str, Any], **settings: Any) -> FastAPI:
    """The application. `options` are those of launch.serve, `models` the entries of `find_models`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load_default(app))
        yield
        loading.cancel()
        await app.state.models.close()

    app = FastAPI(title="jaxchat", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.options, app.state.draining, app.state.starting = options, False, "the model is being loaded"
    app.state.models = Models(models, options, **settings)
    app.state.metrics, app.state.rates = Metrics(app.state.models), Rates(options.requests_per_minute)
    for part in (completions, information, *([inspect] if options.inspect else [])):
        app.include_router(part.router)
    for file in PAGE.iterdir():
        # A route for each file: no path that a client makes up is looked for on the disk.
        app.add_route(f"/{file.name}".removesuffix("index.html"), partial(_file, file))
    app.add_middleware(Guard, state=app.state)
    origins: dict[str, Any] = {"allow_origins": list(options.allow_origins), "allow_methods": ["GET", "POST"]}
    exposed = ["x-request-id", "retry-after"]
    app.add_middleware(CORSMiddleware, **origins, allow_headers=["*"], expose_headers=exposed)
    for kind in (RequestValidationError, HTTPException, ApiError, UserError, Exception):
        app.add_exception_handler(kind, _failed)
    return app


async def _file(file: Path, request: Request) -> FileResponse:
    """A file of the page, which browsers ask for each time, so that all are of one version."""
    return FileResponse(file, headers={"cache-control": "no-cache"})


async def _load_default(app: FastAPI) -> None:
    try:
        with contextlib.ExitStack() as stack:
            await app.state.models.use(None, stack)
        app.state.starting = ""
    except Exception as error:  # The server stays, and /ready says why it is not.
        app.state.starting = str(error)
        LOG.exception("the default model cannot be loaded")


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return as_api_error(error).response()


class Server(uvicorn.Server):
    """A server that answers what is under way before it ends: the first signal refuses new requests, with 503, and
    waits for `drain_seconds` at most; a second ends it at once."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(config)
        self._app, self._drain_seconds = app, drain_seconds

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.should_exit, self.force_exit = True, self.should_exit
        self._app.state.draining = True
        if not self.force_exit:
            log(f"{signal.Signals(sig).name}: finishing the answers under way, for at most {self._drain_seconds:g} s")

    async def main_loop(self) -> None:
        for number in signals.received()[:1]:  # It came before this server took the signals.
            self.handle_exit(number, None)
        signals.forget()  # Engines would be interrupted by it.
        await super().main_loop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = time.monotonic() + self._drain_seconds
        while time.monotonic() < end and self._busy() and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    def _busy(self) -> bool:
        return any(model.users for model in self._app.state.models.loaded.values())


def create_server(app: FastAPI, **settings: Any) -> Server:
    """The server of an application."""
    options = app.state.options
    protocols: dict[str, Any] = {"http": ImpatientHttp, "ws": ImpatientWebSocket, "ws_max_size": options.body_bytes}
    about: dict[str, Any] = {"access_log": False, "server_header": False, "timeout_graceful_shutdown": 2}
    return Server(uvicorn.Config(app, **protocols, **about, **settings), app, options.drain_seconds)


def run(options: Any) -> dict[str, object]:
    """Runs launch.serve until a signal; returns the result for the last line of output.

    Raises:
        UserError: a checkpoint cannot be served, the port is in use, or the address would be open to others.
    """
    named_tools(options.tools)
    key = (options.api_key or os.environ.get("JAXCHAT_API_KEY", "")).strip()
    options = dataclasses.replace(options, api_key=key)
    if not options.api_key and not options.allow_anyone and not is_loopback(options.host):
        raise UserError(
            f"--host={options.host} lets other machines use this server: set --api_key, or --allow_anyone=True"
        )
    models = find_models(options.checkpoint)
    directory = next(iter(models.values())).directory
    jax.config.update("jax_compilation_cache_dir", str((directory.parent.parent / "cache" / "xla").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    app = create_app(options, models)
    app.state.models.sized()  # A wrong checkpoint must fail the start.
    listening = _bind(options.host, options.port)
    _log_lines()
    server = create_server(app, log_config=None)
    host, port = listening.getsockname()[:2]
    named = f"{app.state.models.default} by default, one of {len(models)} models"
    log(f"http://{f'[{host}]' if ':' in host else host}:{port} serves {named}; Ctrl-C stops the server")
    start = time.time()
    server.run(sockets=[listening])
    if any(thread.name.startswith(THREADS) for thread in threading.enumerate()):
        atexit.register(os._exit, 0)  # Python would end the process while XLA works in a thread, which aborts it.
    return {"answers": app.state.metrics.ended, "seconds": round(time.time() - start, 1)}


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket; bound before a model is loaded, which takes longer."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use: choose another with --port, or 0 for any free one") from None
        raise UserError(f"{host} port {port} cannot be served ({error}): set --host and --port") from None


def _log_lines() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("jaxchat.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "jaxchat.serve" else logging.WARNING)
