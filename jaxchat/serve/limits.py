"""What every request passes: its id, API key, rate, size and origin; headers of every answer; one line of the log."""

import asyncio
import base64
import contextlib
import ipaddress
import json
import logging
import re
import secrets
from collections import OrderedDict
from time import monotonic as now
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxchat.serve import connections
from jaxchat.serve.errors import ApiError, as_api_error, shutting_down

LOG = logging.getLogger(__name__)
ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
OPEN = ("/health",)
UNLIMITED = ("/health", "/ready", "/metrics")
MOST_CLIENTS = 10_000
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": CONTENT_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own and reached by no other."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _split(url: str) -> SplitResult:
    """The parts of a URL; empty if it is not valid."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


class Rates:
    """Token buckets: every client may send `per_minute` requests a minute, and as many at once. 0 is no limit."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Counts a request; raises `ApiError` 429 if it is one too many."""
        if not self._per_minute:
            return
        time = now()
        left, then = self._buckets.pop(client, (float(self._per_minute), time))
        left = min(self._per_minute, left + (time - then) * self._per_minute / 60)
        self._buckets[client] = (left - 1 if left >= 1 else left, time)
        while len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        if left < 1:
            message = f"more than {self._per_minute} requests per minute from one client"
            wait = 1 + int((1 - left) * 60 / self._per_minute)
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait)


class Guard:
    """ASGI middleware. `state` has `draining`, `metrics`, `rates` and `options`."""

    def __init__(self, app: ASGIApp, state: Any) -> None:
        self._app, self._state, self._options = app, state, state.options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        number = given if ID.fullmatch(given) else secrets.token_hex(16)
        start, status = now(), 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "websocket.accept":
                status = 101
            elif message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", number.encode()), *HEADERS.items()]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._limited(scope, receive), send_marked)
        except Exception as error:  # One that is no `ApiError` is our mistake.
            if not isinstance(error, ApiError):
                LOG.exception("the request failed", extra={"fields": {"request_id": number}})
            if status:
                raise
            await as_api_error(error).response()(scope, receive, send_marked)
        finally:
            self._note(scope, number, status, now() - start)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        path, host = scope["path"], _split(f"//{headers.get('host', '')}").hostname or ""
        if is_loopback(self._options.host) and not self._options.api_key and not is_loopback(host):
            # The name of another page may have been pointed at this machine.
            raise ApiError(403, f"the host {host} is refused without a key: open 127.0.0.1", code="host_not_allowed")
        if path not in OPEN and not self._knows_key(headers.get("authorization", "")):
            raise ApiError(401, "this server needs a key: send Authorization: Bearer KEY", code="invalid_api_key")
        if scope["type"] == "websocket" and not self._same_origin(headers):
            message = f"pages of {headers.get('origin')} may not open a WebSocket: set --allow_origins"
            raise ApiError(403, message, code="origin_not_allowed")
        if path in UNLIMITED:
            return
        if self._state.draining:
            raise shutting_down()
        if scope["type"] == "http" and scope["method"] == "POST":
            self._state.rates.take((scope.get("client") or ("",))[0])

    def _knows_key(self, authorization: str) -> bool:
        """Whether a header has the API key, as a bearer token or as the password of basic authentication, which
        browsers ask for."""
        if not self._options.api_key:
            return True
        scheme, _, value = authorization.partition(" ")
        given = value.strip().encode("latin-1")  # The bytes of the header.
        if scheme.lower() == "basic":
            with contextlib.suppress(ValueError):  # It is not base64, and no key.
                given = base64.b64decode(given, validate=True).partition(b":")[2]
        return scheme.lower() in ("basic", "bearer") and secrets.compare_digest(given, self._options.api_key.encode())

    def _same_origin(self, headers: dict[str, str]) -> bool:
        """Whether a WebSocket comes from our own page, a program, or an origin of the allow-list."""
        origin = headers.get("origin")
        allowed = self._options.allow_origins
        return origin is None or bool({origin, "*"} & {*allowed}) or _split(origin).netloc == headers.get("host")

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that raises 413 once a body is too large, whatever its header says, and 408 if it is too slow."""
        count, most = 0, self._options.body_bytes
        end = asyncio.get_running_loop().time() + connections.READ_SECONDS if scope["type"] == "http" else None

        async def limited() -> Message:
            nonlocal count, end
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {connections.READ_SECONDS:g} s") from None
            if not message.get("more_body"):
                end = None
            count += len(message.get("body", b""))
            if scope["type"] == "http" and count > most:
                raise HTTPException(413, f"the body is larger than {most} bytes")
            return message

        return limited

    def _note(self, scope: Scope, number: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._state.metrics.requests.labels(route, str(status)).inc()
        self._state.metrics.seconds.labels(route).observe(seconds)
        about = {"request_id": number, "method": scope.get("method", "WS"), "path": scope["path"], "status": status}
        LOG.info("request", extra={"fields": about | {"seconds": round(seconds, 4)}})


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)
