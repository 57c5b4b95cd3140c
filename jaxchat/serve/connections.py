"""Connections as uvicorn has them, but with a limit on how long a client takes to send a request or read an answer."""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.websockets.auto import AutoWebSocketsProtocol

READ_SECONDS = 30.0  # Within which the head of a request must have arrived, and then its body.
WRITE_SECONDS = 30.0  # How long data may wait for the client to read.
Http: Any = AutoHTTPProtocol
WebSocket: Any = AutoWebSocketsProtocol


class Impatient(asyncio.Protocol):
    """Cuts a connection once data has waited WRITE_SECONDS for the client, whose request ends as if it had left."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _cut: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        transport.set_write_buffer_limits(high=0)  # Writing is paused whenever the kernel takes no more.
        super().connection_made(transport)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _stop(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None


class ImpatientHttp(Impatient, Http):
    """HTTP. Cuts a connection on which no request has begun READ_SECONDS after it was made, or after the first bytes
    that follow an answer. `limits.Guard` limits the time of the body."""

    cycle: Any = None
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect()
        elif self._late is not None:
            self._late.cancel()
            self._late = None

    def _expect(self) -> None:
        self._late = self._late or self.loop.call_later(READ_SECONDS, self._cut_late)

    def _cut_late(self) -> None:
        if self.transport.get_protocol() is self:  # It may be a WebSocket by now.
            self.transport.abort()


class ImpatientWebSocket(Impatient, WebSocket):
    """A WebSocket. One that was refused has no handshake to complete, which uvicorn would log as an error."""

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True
