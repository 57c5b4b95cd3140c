"""The routes that answer: /v1/chat/completions, /v1/completions, stream and not, and the WebSocket /ws/chat."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Container
from contextlib import ExitStack
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from jaxchat.decode import requests as decode
from jaxchat.decode.requests import AnswerEnds
from jaxchat.decode.tools import Calculator, usable_tools
from jaxchat.errors import UserError
from jaxchat.serve import protocol
from jaxchat.serve.errors import ApiError, as_api_error, shutting_down
from jaxchat.serve.models import Model
from jaxchat.serve.replies import ChatReply, CompletionReply, Reply
from jaxchat.serve.worker import Delta

T = TypeVar("T")
DEFAULT_TOKENS = 16  # OpenAI's length limit of /v1/completions.

router = APIRouter()


class Functions:
    """The tools of a chat as one tool: a call of a client's function ends the answer, the calculator answers others."""

    call_part, output_part = Calculator.call_part, Calculator.output_part

    def __init__(self, names: Container[str], *, calculator: bool) -> None:
        self._names, self._calculator = names, Calculator() if calculator else None

    def __call__(self, call: str) -> str | None:
        if protocol.read_call(call, self._names):
            raise AnswerEnds
        return self._calculator(call) if self._calculator else None


class Running:
    """An answer under way: its shape, the queue of its deltas, and how many choices are still to end.

    `stack` frees what the answer holds: slots, queue entries, the model.
    """

    def __init__(self, state: Any, stack: ExitStack, reply: Reply) -> None:
        self.reply, self.stack, self.open = reply, stack, 0
        self._state, self._start = state, time.perf_counter()
        self.events: asyncio.Queue[Delta] = asyncio.Queue()
        self._answers: list[Any] = []
        self._model: Model | None = None

    async def submit(self, model: Model, request: decode.Request, first: int = 0) -> None:
        answer = await model.worker.submit(request, self.events, first)
        self.stack.callback(model.worker.cancel, answer)
        self._answers.append(answer)
        self._model = model
        self.open += request.n

    def cancel(self) -> None:
        """Ends the choices that have not ended; their last deltas still come."""
        for answer in self._answers:
            assert self._model is not None
            self._model.worker.cancel(answer)

    async def choices(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Yields the choices of chunks: those that need no token, then those of each set of deltas. Raises `ApiError`
        if the answer fails."""
        yield self.reply.begin()
        started = False
        while self.open:
            batch = [await self.events.get()]
            while not self.events.empty():
                batch.append(self.events.get_nowait())
            if not started:
                started = True
                self._state.metrics.first_token.observe(time.perf_counter() - self._start)
            for delta in batch:
                if delta.finish_reason:
                    self.open -= 1
                    self._state.metrics.end(delta.finish_reason)
            yield [choice for delta in batch for choice in self.reply.add(delta)]
        usage = self.reply.usage()
        for kind, count in (
            ("prompt", usage["prompt_tokens"]),
            ("cached", usage["prompt_tokens_details"]["cached_tokens"]),
            ("answer", usage["completion_tokens"]),
        ):
            self._state.metrics.tokens.labels(kind).inc(count)


async def start_chat(state: Any, stack: ExitStack, body: protocol.Chat) -> Running:
    """Renders the conversation and submits it. Raises `UserError` or `ApiError` for what cannot be answered."""
    model = await _model(state, stack, body.model)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.max_tokens and body.max_completion_tokens:
        raise ApiError(400, "max_tokens is the old name of max_completion_tokens: give one", param="max_tokens")
    n, engine = body.n or 1, model.worker.engine
    model.worker.check_room(n)
    prompt = await asyncio.to_thread(body.prompt, engine.tokenizer)
    names = {function["name"] for function in body.functions()}
    usable = bool(usable_tools(engine.tokenizer.chat_format))
    calculator = usable and "calculator" in state.options.tools and body.tool_choice != "none"
    seed = body.chosen_seed
    most = min(body.max_completion_tokens or body.max_tokens or engine.shape.length, engine.shape.length)
    request = decode.Request(
        prompt,
        body.params(seed=seed, max_tokens=most),
        n=n,
        tools=[Functions(names, calculator=calculator)] if names or calculator else [],
        keep=True,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else 0,
    )
    about = {"count": n, "model": model.entry.name, "seed": seed, "fingerprint": model.fingerprint, "body": body}
    running = Running(state, stack, ChatReply(engine.tokenizer, functions=names, **about))
    for choice in running.reply.choices:
        choice.prompt_tokens = len(prompt)
    await running.submit(model, request)
    return running


async def start_completion(state: Any, stack: ExitStack, body: protocol.Completion) -> Running:
    """Submits the prompts, and scores them if they are to be echoed with log-probabilities."""
    model = await _model(state, stack, body.model)
    n, engine, seed = body.n or 1, model.worker.engine, body.chosen_seed
    most = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    params = body.params(seed=seed, max_tokens=max(1, min(most, engine.shape.length)))
    prompts = await asyncio.to_thread(body.prompts, engine.tokenizer)
    if len(prompts) * n > protocol.MOST_PROMPTS:
        raise ApiError(400, f"{len(prompts)} prompts with n={n} are more than {protocol.MOST_PROMPTS} answers")
    model.worker.check_room(len(prompts) * n)
    about = {"model": model.entry.name, "seed": seed, "fingerprint": model.fingerprint, "body": body}
    reply = CompletionReply(engine.tokenizer, count=len(prompts) * n, **about)
    running = Running(state, stack, reply)
    for number, prompt in enumerate(prompts):
        ids = engine.check(body.first_tokens(prompt, engine.tokenizer) + prompt, room=min(1, most))
        scores: list[decode.Token] = []
        if body.echo and body.logprobs is not None:
            scored = await model.worker.call(lambda engine, ids=ids: engine.score(ids))  # type: ignore[misc]
            scores = [token._replace(top=token.top[: body.logprobs]) for token in scored]
        for index in range(number * n, number * n + n):
            reply.choices[index].prompt_tokens = len(ids)
            if body.echo:
                reply.echo(index, prompt, scores)
            if not most:
                reply.choices[index].finish_reason = "length"
        if most:
            request = decode.Request(ids, params, n=n, top_logprobs=body.logprobs or 0)
            await running.submit(model, request, number * n)
    return running


async def _model(state: Any, stack: ExitStack, name: str | None) -> Model:
    model: Model = await state.models.use(name)
    stack.callback(model.release)
    return model


@router.post("/v1/chat/completions")
async def chat(body: protocol.Chat, request: Request) -> Response:
    """Answers a conversation."""
    stack = ExitStack()
    return await respond(request, stack, body, start_chat(request.app.state, stack, body))


@router.post("/v1/completions")
async def completion(body: protocol.Completion, request: Request) -> Response:
    """Continues texts."""
    stack = ExitStack()
    return await respond(request, stack, body, start_completion(request.app.state, stack, body))


async def respond(request: Request, stack: ExitStack, body: protocol.Sampling, start: Awaitable[Running]) -> Response:
    """The response of an answer: a stream of its chunks, or the whole."""
    if body.stream_options and not body.stream:
        start.close()  # type: ignore[attr-defined]
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    try:
        running = await while_connected(request.receive, start)
        if body.stream:
            return Events(running)
        await while_connected(request.receive, _finish(running))
        response = JSONResponse(running.reply.whole())
    except BaseException:  # Also if the client has left; it is raised again.
        stack.close()
        raise
    stack.close()
    return response


async def _finish(running: Running) -> None:
    async for _ in running.choices():
        pass


class Events(StreamingResponse):
    """Server-sent events of an answer. Whatever ends the response frees what the answer holds, also before its first
    byte: a generator that never started would free nothing."""

    def __init__(self, running: Running) -> None:
        super().__init__(self._lines(running), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._stack = running.stack

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
        self._socket, self._task = socket, asyncio.ensure_future(asyncio.sleep(0))
        self._running: Running | None = None

    async def read(self, text: str) -> None:
        """Does what a message asks for."""
        try:
            message = json.loads(text)
            kind = message.pop("type", None) if isinstance(message, dict) else None
            if kind == "cancel":
                if self._running:
                    self._running.cancel()
                else:
                    self._task.cancel()
            elif kind != "chat":
                raise ApiError(400, 'a message is an object with "type": "chat" or "cancel"')
            elif not self._task.done():
                raise ApiError(409, "an answer is under way: cancel it first")
            else:
                if self._socket.app.state.draining:
                    raise shutting_down()
                self._socket.app.state.rates.take(self._socket.client.host if self._socket.client else "")
                self._task = asyncio.create_task(self._answer(protocol.Chat.model_validate(message)))
        except ValidationError as error:
            await self._say("error", ApiError(422, first_mistake(error.errors())).body())
        except (ValueError, RecursionError):
            await self._say("error", ApiError(400, "the message is not JSON").body())
        except ApiError as error:
            await self._say("error", error.body())

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
        except (ApiError, UserError) as error:
            await self._say("error", as_api_error(error).body())
        finally:
            self._running = None

    async def _say(self, kind: str, value: dict[str, Any]) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # The client has left; `read` notices.
            await self._socket.send_text(json.dumps({"type": kind, **value}, ensure_ascii=False))


def first_mistake(errors: Any) -> str:
    """The first mistake of a body in one sentence, without the value, which may be long or not printable."""
    error = errors[0]
    place = ".".join(map(str, error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]))
    return f"{place or 'the body'}: {error['msg']}"
