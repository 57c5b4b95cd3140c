"""One thread owns an engine; the event loop sends it work through an inbox and gets deltas back.

The loop never waits for a device: it puts functions into the inbox, which the thread calls between two steps of the
engine. After each step the thread hands all new tokens to the loop in one call.

If the engine raises, nobody knows which request did it. The engine is reset, and its requests are restarted from their
seeds in two halves, one after the other; a half that raises is halved again, until the culprit fails alone. Tokens that
a client has already got are not sent twice. New requests wait meanwhile.
"""

import asyncio
import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

from jaxchat.decode.engine import Engine
from jaxchat.decode.requests import Request, Token
from jaxchat.decode.sample import Sample
from jaxchat.serve.errors import ApiError

T = TypeVar("T")
LOG = logging.getLogger(__name__)
RESTARTED = "the engine failed, and the restarted answer differs from what was already sent: try again"


class Delta(NamedTuple):
    """New tokens of choice number `choice`. `reused`: number of prompt tokens that the prefix cache had. The last delta
    of a choice has a finish reason of `Completion`, and an error if that is "error".
    """

    choice: int
    tokens: Sequence[Token]
    reused: int = 0
    finish_reason: str = ""
    error: str | None = None


@dataclass(eq=False)
class Answer:
    """A request under way. Its sample number i is choice `first` + i; its deltas go to `events`.

    Attributes:
        accepted: done once the engine has taken the request, or refused it.
        sent: ids of the tokens of each sample that were sent.
        ended: whether each sample's last delta was sent.
    """

    request: Request
    first: int
    events: asyncio.Queue[Delta]
    accepted: asyncio.Future[None]
    samples: list[Sample] = field(default_factory=list)
    sent: list[list[int]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)
    cancelled: bool = False
    restarted: bool = False

    def __post_init__(self) -> None:
        self.sent, self.ended = [[] for _ in range(self.request.n)], [False] * self.request.n


class Worker:
    """The thread of an engine. All public methods are called in the event loop.

    Attributes:
        pending: number of samples that have not ended, in slots and waiting.
        most_waiting: number of samples that may wait for a slot; more are refused.
        failure: why the thread cannot continue; None while it can.
    """

    def __init__(self, engine: Engine, *, most_waiting: int, name: str = "engine") -> None:
        self.engine, self.most_waiting, self.pending, self.failure = engine, most_waiting, 0, ""
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._live: list[Answer] = []
        self._groups: deque[list[Answer]] = deque()
        self._open = True
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of samples that wait for a slot."""
        return max(0, self.pending - self.engine.shape.slots)

    async def submit(self, request: Request, events: asyncio.Queue[Delta], first: int = 0) -> Answer:
        """Queues a request and waits until the engine has taken it, at most one chunk.

        Raises:
            UserError: the engine refuses the request.
            ApiError: too many requests wait (429), or the engine is out of order (503).
        """
        self.check_room(request.n)
        answer = Answer(request, first, events, self._loop.create_future())
        self.pending += request.n
        self._inbox.put(partial(self._start, answer))
        try:
            await answer.accepted
        except BaseException:  # Also if the client has left; it is raised again.
            self.cancel(answer)
            raise
        return answer

    def check_room(self, samples: int) -> None:
        """Raises `ApiError` if the queue has no room for so many more samples (429, or 400 if it never has), or the
        engine is out of order (503)."""
        if self.failure:
            raise ApiError(503, f"the engine of this model is out of order ({self.failure}): restart the server")
        most = self.engine.shape.slots + self.most_waiting
        if samples > most:  # It would be refused however often it is sent.
            raise ApiError(400, f"{samples} answers are asked for, but this server takes at most {most} (--queue)")
        if self.pending + samples > most:
            message = f"{self.waiting} answers are waiting already; the limit is {self.most_waiting}"
            raise ApiError(429, message, code="queue_full", retry_after=1)

    def cancel(self, answer: Answer) -> None:
        """Ends an answer; its slot is free after the current chunk. Nothing happens if it has ended."""
        self._inbox.put(partial(self._cancel, answer))

    async def call(self, function: Callable[[], T]) -> T:
        """Runs a function that asks the engine in its thread, between two steps."""
        self.check_room(0)
        future: asyncio.Future[T] = self._loop.create_future()

        def work() -> None:
            try:
                if not future.cancelled():
                    self._call_on_loop(_settle, future, function())
            except Exception as error:  # It is raised where the call is awaited.
                self._call_on_loop(_settle, future, None, error)

        self._inbox.put(work)
        return await future

    def close(self) -> None:
        """Ends all answers and the thread, which frees the engine."""

        self._inbox.put(partial(setattr, self, "_open", False))

    def join(self) -> None:
        """Waits for the thread's end, after `close`."""
        self._thread.join()

    # Everything below runs in the thread.

    def _run(self) -> None:
        while self._open:
            try:
                self._read_inbox(wait=not self._live)
                if self._live:
                    self._step()
            except Exception as error:  # Only a reset that fails gets here.
                LOG.exception("the engine cannot be reset")
                self.failure = f"{type(error).__name__}: {error}"
                self._end_all("error", self.failure)
        self._end_all("cancelled")

    def _read_inbox(self, *, wait: bool) -> None:
        while wait or not self._inbox.empty():
            self._inbox.get()()
            wait = False

    def _step(self) -> None:
        try:
            self.engine.step()
        except Exception as error:  # One request must not end the others.
            LOG.exception("the engine failed with %d requests", len(self._live))
            self._divide(error)
        self._send()
        while not self._live and self._groups:
            self._live = self._groups.popleft()
            for answer in list(self._live):
                self._enter(answer)

    def _start(self, answer: Answer) -> None:
        """Gives a new request to the engine, or keeps it until those are done that a failure has restarted."""
        if self._groups:
            self._groups[-1].append(answer)
        else:
            self._live.append(answer)
            self._enter(answer)

    def _enter(self, answer: Answer) -> None:
        try:
            if answer.cancelled:
                self._end(answer, "cancelled")
            else:
                answer.restarted = bool(answer.samples)
                answer.samples = self.engine.submit(answer.request)
                self._call_on_loop(_settle, answer.accepted)
                return
        except Exception as error:  # It is raised where the answer is awaited.
            self._call_on_loop(_settle, answer.accepted, None, error)
            self._end(answer, "error", str(error))
        self._live.remove(answer)

    def _cancel(self, answer: Answer) -> None:
        answer.cancelled = True
        for sample in answer.samples:
            sample.cancel()

    def _divide(self, error: Exception) -> None:
        """Resets the engine, and queues its answers for a restart in two halves; a single one fails."""
        self.engine.reset()
        live, self._live = [answer for answer in self._live if not all(answer.ended)], []
        if len(live) == 1:
            reason = f"the engine failed with this request: {type(error).__name__}"
            self._end(live[0], "error", reason)
            live = []
        half = len(live) // 2
        if not self._groups:
            self._groups.append([])  # New requests wait in a group of their own.
        self._groups.extendleft(group for group in (live[half:], live[:half]) if group)

    def _send(self) -> None:
        """Sends to the loop what is new since the last call."""
        batch: list[tuple[Answer, Delta]] = []
        for answer in self._live:
            for i, sample in enumerate(answer.samples):
                sent = answer.sent[i]
                if answer.ended[i]:
                    continue
                if answer.restarted and sample.tokens[: len(sent)] != sent[: len(sample.tokens)]:
                    sample.cancel()
                    batch.append((answer, Delta(answer.first + i, (), finish_reason="error", error=RESTARTED)))
                    answer.ended[i] = True
                elif (new := sample.since(len(sent))) or sample.finish_reason:
                    sent += [token.id for token in new]
                    rest = (sample.reused, sample.finish_reason, sample.error)
                    batch.append((answer, Delta(answer.first + i, new, *rest)))
                    answer.ended[i] = bool(sample.finish_reason)
        self._live = [answer for answer in self._live if not all(answer.ended)]
        if batch:
            self._call_on_loop(self._deliver, batch)

    def _end(self, answer: Answer, reason: str, error: str | None = None) -> None:
        """Sends the end of all samples of an answer that have not ended."""
        ends = [
            (answer, Delta(answer.first + i, (), 0, reason, error)) for i, ended in enumerate(answer.ended) if not ended
        ]
        answer.ended = [True] * len(answer.ended)
        self._call_on_loop(self._deliver, ends)

    def _end_all(self, reason: str, error: str | None = None) -> None:
        for answer in itertools.chain(self._live, *self._groups):
            self._call_on_loop(_settle, answer.accepted)
            self._end(answer, reason, error)
        self._live.clear()
        self._groups.clear()

    def _call_on_loop(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Has the loop call a function; nobody listens any more if the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            self._open = False

    def _deliver(self, batch: Sequence[tuple[Answer, Delta]]) -> None:  # In the loop.
        for answer, delta in batch:
            self.pending -= bool(delta.finish_reason)
            answer.events.put_nowait(delta)


def _settle(future: asyncio.Future[Any], value: Any = None, error: Exception | None = None) -> None:
    if not future.done():
        future.set_exception(error) if error else future.set_result(value)
