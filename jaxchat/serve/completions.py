"""The routes that answer: /v1/chat/completions, /v1/completions, stream and not, and the WebSocket /ws/chat."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from contextlib import ExitStack
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from jaxchat.decode import requests as decode
from jaxchat.decode.requests import AnswerEnds
from jaxchat.decode.tools import Calculator, usable_tools
from jaxchat.serve import protocol
from jaxchat.serve.errors import ApiError, as_api_error, shutting_down
from jaxchat.serve.models import Model
from jaxchat.serve.replies import ChatReply, CompletionReply, Reply
from jaxchat.serve.worker import Answer, Delta

T = TypeVar("T")
DEFAULT_TOKENS = 16  # OpenAI's length limit of /v1/completions.

router = APIRouter()


class Functions(Calculator):
    """The tools of a chat as one tool: a call of a client's function ends the answer, the calculator answers others."""

    def __init__(self, names: Container[str], *, calculator: bool) -> None:
        self._names, self._calculates = names, calculator

    def __call__(self, call: str) -> str | None:
        if protocol.read_call(call, self._names):
            raise AnswerEnds
        return super().__call__(call) if self._calculates else None


class Running:
    """An answer under way: its shape, the queue of its deltas, and how many choices are still to end. Closing `stack`
    frees its slots and queue entries."""

    def __init__(self, state: Any, stack: ExitStack, model: Model, reply: Reply) -> None:
        self.reply, self._state, self._stack, self._worker = reply, state, stack, model.worker
        self._start, self._open = time.perf_counter(), 0
        self._events: asyncio.Queue[Delta] = asyncio.Queue()
        self._answers: list[Answer] = []

    async def submit(self, request: decode.Request, first: int = 0) -> None:
        answer = await self._worker.submit(request, self._events, first)
        self._stack.callback(self._worker.cancel, answer)
        self._answers.append(answer)
        self._open += request.n

    def cancel(self) -> None:
        """Ends the choices that have not ended; their last deltas still come."""
        for answer in self._answers:
            self._worker.cancel(answer)

    async def choices(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Yields the choices of chunks: those that need no token, then those of each set of deltas. Raises `ApiError`
        if the answer fails."""
        metrics, started = self._state.metrics, False
        yield self.reply.begin()
        while self._open:
            batch = [await self._events.get()]
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            if not started:
                started = True
                metrics.first_token.observe(time.perf_counter() - self._start)
            for delta in batch:
                if delta.finish_reason:
                    self._open -= 1
                    metrics.end(delta.finish_reason)
            yield [choice for delta in batch for choice in self.reply.add(delta)]
        usage = self.reply.usage()
        metrics.tokens.labels("prompt").inc(usage["prompt_tokens"])
        metrics.tokens.labels("cached").inc(usage["prompt_tokens_details"]["cached_tokens"])
        metrics.tokens.labels("answer").inc(usage["completion_tokens"])


async def start_chat(state: Any, stack: ExitStack, body: protocol.Chat) -> Running:
    """Renders the conversation and submits it. Raises `UserError` or `ApiError` for what cannot be answered."""
    body.check()
    model = await state.models.use(body.model, stack)
    n, engine, names = body.n or 1, model.engine, body.names
    model.worker.check_room(n)
    prompt = await asyncio.to_thread(body.prompt, engine.tokenizer)
    usable = bool(usable_tools(engine.tokenizer.chat_format))
    begun = body.begun(engine.tokenizer) if usable else []
    calculator = usable and "calculator" in state.options.tools and body.tool_choice != "none"
    reply = ChatReply(model, body, count=n, prompt_tokens=len(prompt), begun=begun)
    length = engine.shape.length
    most = min(body.max_completion_tokens or body.max_tokens or length, length) - len(begun)
    if most < 1:
        raise ApiError(400, f"max_tokens must be more than the {len(begun)} that begin a call", param="max_tokens")
    request = decode.Request(
        prompt + begun,
        body.params(seed=reply.seed, max_tokens=most),
        n=n,
        tools=[Functions(names, calculator=calculator)] if names or calculator else [],
        store=True,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else 0,
        begun=len(begun),
    )
    running = Running(state, stack, model, reply)
    await running.submit(request)
    return running


async def start_completion(state: Any, stack: ExitStack, body: protocol.Completion) -> Running:
    """Submits the prompts, and scores them if they are to be echoed with log-probabilities."""
    body.check()
    model = await state.models.use(body.model, stack)
    n, engine, bos = body.n or 1, model.engine, model.engine.tokenizer.bos
    most = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    prompts = await asyncio.to_thread(body.prompts, engine.tokenizer)
    if len(prompts) * n > protocol.MOST_PROMPTS:
        raise ApiError(400, f"{len(prompts)} prompts with n={n} are more than {protocol.MOST_PROMPTS} answers")
    model.worker.check_room(len(prompts) * n)
    reply = CompletionReply(model, body, count=len(prompts) * n)
    params = body.params(seed=reply.seed, max_tokens=max(1, min(most, engine.shape.length)))
    running = Running(state, stack, model, reply)
    for number, prompt in enumerate(prompts):
        added = [] if body.add_special_tokens is False or prompt[:1] == [bos] else [bos]
        ids = engine.check(added + prompt, room=min(1, most))
        scores: list[decode.Token] = []
        if body.echo and body.logprobs is not None:
            scored = await model.worker.call(lambda ids=ids: engine.score(ids))
            scores = [token._replace(top=token.top[: body.logprobs]) for token in scored]
        for choice in reply.choices[number * n : number * n + n]:
            choice.prompt_tokens = len(ids)
            if body.echo:
                reply.echo(choice, prompt, scores)
            if not most:
                choice.finish_reason = "length"
        if most:
            await running.submit(decode.Request(ids, params, n=n, top_logprobs=body.logprobs or 0), number * n)
    return running


@router.post("/v1/chat/completions")
async def chat(body: protocol.Chat, request: Request) -> Response:
    """Answers a conversation."""
    return await respond(request, body, start_chat)


@router.post("/v1/completions")
async def completion(body: protocol.Completion, request: Request) -> Response:
    """Continues texts."""
    return await respond(request, body, start_completion)


async def respond(request: Request, body: Any, start: Callable[[Any, ExitStack, Any], Awaitable[Running]]) -> Response:
    """The response of an answer: a stream of its chunks, or the whole."""
    with ExitStack() as stack:
        running = await while_connected(request.receive, start(request.app.state, stack, body))
        if body.stream:
            return Events(running, stack.pop_all())
        await while_connected(request.receive, _finish(running))
        return JSONResponse(running.reply.whole())


async def _finish(running: Running) -> None:
    async for _ in running.choices():
        pass


class Events(StreamingResponse):
    """Server-sent events of an answer. Whatever ends the response frees what the answer holds, also before its first
    byte: a generator that never started would free nothing."""

    def __init__(self, running: Running, stack: ExitStack) -> None:
        super().__init__(self._lines(running), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stack, contextlib.suppress(ApiError):  # A client that has left gets no answer.
            await while_connected(receive, super().__call__(scope, receive, send))

    @staticmethod
    async def _lines(running: Running) -> AsyncIterator[str]:
        reply = running.reply
        try:
            async for choices in running.choices():
                if choices:
                    yield "".join(_event(reply.chunk([choice])) for choice in choices)
        except Exception as error:  # The status was sent before, so an error of any kind becomes the last event.
            yield _event(as_api_error(error).body())
            return
        yield (_event(reply.chunk([], usage=True)) if reply.body.include_usage else "") + "data: [DONE]\n\n"


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client leaves; then raises `ApiError` 499."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client has left")
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


@router.websocket("/ws/chat")
async def talk(socket: WebSocket) -> None:
    """Chats over a WebSocket: {"type": "chat", ...body of /v1/chat/completions} and {"type": "cancel"} come, chunks of
    a stream as {"type": "chunk", ...}, {"type": "done", "finish_reason", "usage"}, {"type": "error", "error"} go.
    """
    await socket.accept()
    talking = Talking(socket)
    try:
        while True:
            await talking.read(await socket.receive_text())
    except (WebSocketDisconnect, KeyError):  # KeyError: a binary message.
        pass
    finally:
        await talking.stop()


class Talking:
    """The answer of a WebSocket, at most one at a time."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._running: Running | None = None
        self._task: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task.set_result(None)  # None is under way.

    async def read(self, text: str) -> None:
        """Does what a message asks for."""
        state, message = self._socket.app.state, protocol.parsed(text)
        kind = message.pop("type", None) if isinstance(message, dict) else None
        try:
            if kind == "cancel":
                if self._running:
                    self._running.cancel()
                elif not self._task.done():  # It has no slot yet.
                    await self.stop()
                    await self._say("done", {"finish_reason": "cancelled", "usage": None})
            elif kind != "chat":
                raise ApiError(400, 'a message is a JSON object with "type": "chat" or "cancel"')
            elif not self._task.done():
                raise ApiError(409, "an answer is under way: cancel it first")
            elif state.draining:
                raise shutting_down()
            else:
                state.rates.take(self._socket.client.host if self._socket.client else "")
                self._task = asyncio.create_task(self._answer(protocol.Chat.model_validate(message)))
        except (ApiError, ValidationError) as error:
            await self._say("error", as_api_error(error).body())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _answer(self, body: protocol.Chat) -> None:
        try:
            with ExitStack() as stack:
                self._running = running = await start_chat(self._socket.app.state, stack, body)
                async for choices in running.choices():
                    for choice in choices:
                        await self._say("chunk", running.reply.chunk([choice]))
                reason = running.reply.choices[0].finish_reason
                await self._say("done", {"finish_reason": reason, "usage": running.reply.usage()})
        except Exception as error:  # An error of any kind becomes the last message.
            await self._say("error", as_api_error(error).body())
        finally:
            self._running = None

    async def _say(self, kind: str, value: dict[str, Any]) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # The client has left; `read` notices.
            await self._socket.send_text(json.dumps({"type": kind, **value}, ensure_ascii=False))
