"""One sample of a request while it is decoded: tokens, text, tool calls and finish reason."""

import math
import time
from collections import deque
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

from jaxchat.decode.programs import STOPS
from jaxchat.decode.requests import AnswerEnds, Completion, Request, TextStream, Token, Tool
from jaxchat.errors import NOT_FINITE, UserError
from jaxchat.tokenizer import Tokenizer

TOOL_SECONDS = 30.0  # After which a tool in another thread counts as failed.


class Sample:
    """Sample number `index` of a request. It is finished once `finish_reason` is not empty."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        prompt: tuple[int, ...],
        index: int,
        *,
        context: int,
        ends: set[int],
        tool_pool: Executor | None = None,
    ) -> None:
        self.request, self.prompt, self.index = request, prompt, index
        self._run = _run if tool_pool is None else tool_pool.submit
        self.output: Future[str | None] | None = None
        """Of a tool that was called and whose output was not read yet; the sample is not decoded meanwhile."""
        sampling = request.sampling
        self.finish_reason = ""
        self.error: str | None = None
        self.tokens: list[int] = []
        self.text = np.zeros(context, np.int32)
        """Tokens of prompt and answer by position."""
        self.text[: len(prompt)] = prompt
        self.surplus: list[int] = []
        """Tokens that the device decoded after the end of the answer; they are in the cache."""
        self.forced: deque[int] = deque()
        """Tokens of tool output that are still to be decoded."""
        self.limit = min(len(prompt) + sampling.max_tokens, context) - 1
        self._limit_reason = "length" if len(prompt) + sampling.max_tokens <= context else "context"
        self.stops = set(sampling.stop_tokens) | (set() if sampling.ignore_end else ends)
        self._parts = tokenizer.chat_format.parts
        self._tools = {tokenizer.specials[self._parts[tool.call_part].begin]: tool for tool in request.tools}
        self._call: tuple[Tool, list[int]] | None = None
        """The call that is being written, or whose output is awaited."""
        self._called = 0.0
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, sampling.stop)
        self._unread: list[str] = []
        self._logprobs: list[float] = []
        self._sampling_logprobs: list[float] = []
        self._sampled: list[bool] = []
        self._support: list[np.ndarray] = []
        self._top: list[list[tuple[int, float]]] = []
        self.reused = 0
        """Number of prompt tokens that the prefix cache had."""
        self._start = self._end = time.perf_counter()
        self._first = 0.0
        for token in prompt[len(prompt) - request.begun :]:
            self._follow_call(token)

    @property
    def position(self) -> int:
        """Position of the last token."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def pauses(self) -> list[int]:
        """Ends of tool calls, and stop tokens up to STOPS in all: the device stops decoding the slot at one."""
        calls = {self._tokenizer.specials[self._parts[tool.call_part].end] for tool in self.request.tools}
        return [*sorted(calls), *sorted(self.stops - calls)[: max(0, STOPS - len(calls))]]

    @property
    def returns_support(self) -> bool:
        """Whether the support of the sampling distribution is requested, and can be less than all tokens."""
        return self.request.return_support and self.request.sampling.level == "full"

    def give(
        self,
        token: Any,
        logprob: Any,
        sampling_logprob: Any,
        support_C: np.ndarray | None = None,
        top_token_K: np.ndarray | None = None,
        top_logprob_K: np.ndarray | None = None,
    ) -> None:
        """Appends a token that the device decoded; then finishes the sample or calls a tool if due."""
        token = int(token)
        if self.finish_reason:
            self.surplus.append(token)
            return
        forced = bool(self.forced)
        if forced:
            token = self.forced.popleft()
        elif not math.isfinite(float(logprob) + float(sampling_logprob)):
            self.fail(NOT_FINITE)
            return
        elif not self.tokens:
            self._first = time.perf_counter()
        self.tokens.append(token)
        self.text[self.position] = token
        self._sampled.append(not forced)
        self._logprobs.append(0.0 if forced else float(logprob))
        self._sampling_logprobs.append(0.0 if forced else float(sampling_logprob))
        if self.returns_support:
            assert support_C is not None
            self._support.append(np.full_like(support_C, 255) if forced else support_C.copy())
        if count := self.request.top_logprobs:
            assert top_token_K is not None and top_logprob_K is not None
            self._top.append(list(zip(top_token_K[:count].tolist(), top_logprob_K[:count].tolist())))
        if not forced and token in self.stops:
            self._finish("stop")
            return
        self._unread.append(self._stream.add(token))
        if self._stream.stopped:
            self._finish("stop")
        elif self.position >= self.limit:
            self._finish(self._limit_reason)
        elif not forced:
            self._follow_call(token)

    def _follow_call(self, token: int) -> None:
        """Collects a tool call from its begin token to its end token, then runs the tool."""
        if token in self._tools:
            self._call = self._tools[token], []
        elif self._call is not None:
            tool, call = self._call
            if token != self._tokenizer.specials[self._parts[tool.call_part].end]:
                call.append(token)
                return
            self.output, self._called = self._run(tool, self._tokenizer.decode(call)), time.perf_counter()
            self.read_output()

    def read_output(self) -> None:
        """Queues the output of a tool that has ended, if there is one. A tool that takes too long fails the sample."""
        if self.output is None or self._call is None:
            return
        if not self.output.done():
            if time.perf_counter() - self._called > TOOL_SECONDS:
                self.fail(f"the tool {type(self._call[0]).__name__} gave no answer within {TOOL_SECONDS:g} s")
            return
        specials, (tool, _), future = self._tokenizer.specials, self._call, self.output
        self.output = self._call = None
        try:
            output = future.result()
            output_tokens = None if output is None else self._tokenizer.encode(output)
        except AnswerEnds:
            self._finish("call")
        except Exception as error:  # Tools are user code; an error ends this sample only.
            self.fail(f"the tool {type(tool).__name__} failed: {error}")
        else:
            if output_tokens is not None:
                marks = self._parts[tool.output_part]
                self.forced.extend([specials[marks.begin], *output_tokens, specials[marks.end]])

    def take_text(self) -> str:
        """Returns the text that was added since the last call, with tool calls marked as in `Completion.shown`."""
        text = "".join(self._unread)
        self._unread.clear()
        return text

    def since(self, start: int) -> list[Token]:
        """Returns the tokens from number `start` on, stop token included."""
        tops = self._top[start:] or [[]] * (len(self.tokens) - start)
        columns = (self.tokens[start:], self._logprobs[start:], self._sampled[start:], tops)
        return [Token(*of_token) for of_token in zip(*columns, strict=True)]

    def cancel(self) -> None:
        """Ends an unfinished sample; the engine frees its slot at the next step."""
        if not self.finish_reason:
            self._finish("cancelled")

    def fail(self, reason: str) -> None:
        """Ends the sample with an error."""
        self.error = reason
        self._finish("error")

    def _finish(self, reason: str) -> None:
        self._end = time.perf_counter()
        self._unread.append(self._stream.finish())
        self.finish_reason = reason
        if self.output is not None:
            self.output.cancel()
            self.output = None

    def completion(self) -> Completion:
        """The answer as far as it is decoded."""
        return Completion(
            text=self._stream.text,
            shown=self._stream.shown,
            tokens=tuple(self.tokens),
            logprobs=tuple(self._logprobs),
            sampling_logprobs=tuple(self._sampling_logprobs),
            sampled=tuple(self._sampled),
            finish_reason=self.finish_reason,
            seconds=self._end - self._start,
            first_token_seconds=max(0.0, self._first - self._start),
            error=self.error,
            support=np.stack(self._support) if self._support else None,
        )


def _run(tool: Tool, call: str) -> Future[str | None]:
    """Runs a tool at once."""
    output: Future[str | None] = Future()
    try:
        output.set_result(tool(call))
    except Exception as error:  # It is raised where the output is read.
        output.set_exception(error)
    return output


def refused(error: UserError) -> Completion:
    """Builds the completion of a request that is refused."""
    return Completion("", (), (), (), (), finish_reason="error", error=str(error))
