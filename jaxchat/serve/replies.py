"""Answers of the API: deltas of the engine become choices, whole or in chunks, in the shape of either completion.

What OpenAI's API has no place for are fields of their own: `seed`, which repeats an answer, and `parts`: text, calls of
built-in tools and their results in order. Calls and results are not in `content`.
"""

import codecs
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxchat.decode.requests import TextStream, Token
from jaxchat.serve.errors import ApiError
from jaxchat.serve.models import Model
from jaxchat.serve.protocol import read_call
from jaxchat.serve.worker import Delta
from jaxchat.tokenizer import Tokenizer

FINISH = {"stop": "stop", "length": "length", "context": "length", "call": "tool_calls", "cancelled": "stop"}
LEAST_LOGPROB = -9999.0  # JSON has no infinity.

Piece = tuple[str, str]  # Kind of a part ("text", or a kind of the chat format), and text; "" where the part begins.


class Parts:
    """Converts tokens to pieces of parts; holds back incomplete characters and what may begin a stop text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, split: bool) -> None:
        self._tokenizer, self._stop, self.kind = tokenizer, stop, "text"
        self._stream = TextStream(tokenizer, stop)
        parts = tokenizer.chat_format.parts.items() if split else ()
        self._borders = {tokenizer.specials[marks.begin]: kind for kind, marks in parts}
        self._borders |= {tokenizer.specials[marks.end]: "text" for _, marks in parts}
        self._specials = set(tokenizer.specials.values())

    def add(self, token: int) -> Iterator[Piece]:
        """Yields what is certain after a token. The beginning of a part that is not text is a piece without text."""
        if token in self._borders:
            yield from self.finish()
            self.kind, self._stream = self._borders[token], TextStream(self._tokenizer, self._stop)
            if self.kind != "text":
                yield self.kind, ""
        elif token not in self._specials and (text := self._stream.add(token)):
            yield self.kind, text

    def finish(self) -> Iterator[Piece]:
        """Yields what was held back."""
        if text := self._stream.finish():
            yield self.kind, text


@dataclass
class Choice:
    """The state of one choice: its parts so far, and the entries of its log-probabilities."""

    index: int
    pieces: Parts
    prompt_tokens: int
    parts: list[list[str]] = field(default_factory=list)
    entries: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int = 0
    reused: int = 0
    echo: str = ""
    characters: int = 0
    """Of the text before the next token, for `text_offset`."""
    offsets: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, delta: Delta) -> tuple[list[Piece], list[Token]]:
        """Adds new tokens; returns the pieces that are certain, and the tokens that belong to text."""
        new: list[Piece] = []
        texts = []
        for token in delta.tokens:
            before = self.pieces.kind
            new += self.pieces.add(token.id)
            if before == "text" == self.pieces.kind:
                texts.append(token)
        if delta.finish_reason:
            new += self.pieces.finish()
            self.finish_reason = delta.finish_reason
        self.tokens += len(delta.tokens)
        self.reused = max(self.reused, min(delta.reused, self.prompt_tokens))
        for kind, text in new:
            if not text or not self.parts or self.parts[-1][0] != kind:
                self.parts.append([kind, ""])
            self.parts[-1][1] += text
        return new, texts

    @property
    def text(self) -> str:
        return "".join(text for kind, text in self.parts if kind == "text")


class Reply:
    """All choices of one answer. Subclasses are the two shapes."""

    kind, prefix, split = "", "", False

    def __init__(self, model: Model, body: Any, *, count: int, prompt_tokens: int = 0) -> None:
        self.tokenizer, self.body = model.loaded.tokenizer, body
        # 32 bits, because not every JSON reader keeps more than 53 exact.
        self.seed = secrets.randbits(32) if body.seed is None else body.seed
        self.logprobs = body.logprobs is not None and body.logprobs is not False  # 0 is a number of top ones.
        parts = [Parts(self.tokenizer, body.stops, split=self.split) for _ in range(count)]
        self.choices = [Choice(i, pieces, prompt_tokens) for i, pieces in enumerate(parts)]
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "object": self.kind, "created": int(time.time())}
        self.head |= {"model": model.entry.name, "system_fingerprint": model.fingerprint, "seed": self.seed}

    def begin(self) -> list[dict[str, Any]]:
        """Choices of the chunks before the first token."""
        return []

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        """Adds new tokens; returns the choices of the chunks that they make. Raises `ApiError` if the answer failed."""
        if delta.finish_reason == "error":
            raise ApiError(500, delta.error or "the answer failed", code="engine_error")
        choice = self.choices[delta.choice]
        first = len(choice.entries)
        pieces, texts = choice.add(delta)
        ends = {*self.tokenizer.ends, *(self.body.stop_token_ids or ())}
        if delta.finish_reason == "stop" and texts and texts[-1].id in ends:
            texts.pop()
        if self.logprobs:
            self._enter(choice, texts)
        return list(self._chunks(choice, pieces, choice.entries[first:]))

    def chunk(self, choices: list[dict[str, Any]], usage: bool = False) -> dict[str, Any]:
        """One chunk of a stream. If usage is requested, it is null in all but the last, which has no choices."""
        body = {**self.head, "choices": choices}
        if self.kind == "chat.completion":
            body["object"] = "chat.completion.chunk"
        if self.body.include_usage:
            body["usage"] = self.usage() if usage else None
        return body

    def whole(self) -> dict[str, Any]:
        return {**self.head, "choices": [self._choice(choice) for choice in self.choices], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of each prompt once, and of all answers."""
        per_prompt = self.choices[:: self.body.n or 1]
        prompt = sum(choice.prompt_tokens for choice in per_prompt)
        answer = sum(choice.tokens for choice in self.choices)
        cached = {"cached_tokens": sum(choice.reused for choice in per_prompt)}
        counts = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        return counts | {"prompt_tokens_details": cached}

    def _enter(self, choice: Choice, tokens: Sequence[Token]) -> None:
        """Adds the entries of the log-probabilities of tokens."""
        raise NotImplementedError

    def _chunks(self, choice: Choice, pieces: list[Piece], entries: list[Any]) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _choice(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def named(self, token: int) -> str:
        """The text of a token, the name of a special one, or its bytes if they are no text, as OpenAI writes them."""
        data = self.tokenizer.decode_bytes([token], keep_specials=True)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def tops(self, token: Token) -> dict[int, float]:
        """The most likely tokens; the chosen one has the log-probability that is given for it elsewhere."""
        return {i: max(token.logprob if i == token.id else value, LEAST_LOGPROB) for i, value in token.top}


class ChatReply(Reply):
    """The shape of /v1/chat/completions. `begun`: tokens that all choices begin with."""

    kind, prefix, split = "chat.completion", "chatcmpl", True

    def __init__(self, model: Model, body: Any, *, begun: Sequence[int] = (), **sizes: int) -> None:
        super().__init__(model, body, **sizes)
        self._begun = [Token(token, 0.0, sampled=False) for token in begun]

    def begin(self) -> list[dict[str, Any]]:
        roles = [_delta(choice, role="assistant", content="") for choice in self.choices]
        return roles + [chunk for i in range(len(roles)) for chunk in self.add(Delta(i, self._begun))]

    def _enter(self, choice: Choice, tokens: Sequence[Token]) -> None:
        for token in tokens:
            if token.sampled:
                tops = [self._entry(i, value) for i, value in self.tops(token).items()]
                choice.entries.append(self._entry(token.id, token.logprob) | {"top_logprobs": tops})

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.decode_bytes([token], keep_specials=True)
        return {"token": self.named(token), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    def _chunks(self, choice: Choice, pieces: list[Piece], entries: list[Any]) -> Iterator[dict[str, Any]]:
        for kind, text in pieces or ([("text", "")] if entries else []):
            delta: dict[str, Any] = {"content": text} if kind == "text" else {"parts": [{"type": kind, "text": text}]}
            yield _delta(choice, {"content": entries} if entries and kind == "text" else None, **delta)
            entries = entries if kind != "text" else []
        if entries:
            yield _delta(choice, {"content": entries}, content="")
        if choice.finish_reason:
            if calls := self._calls(choice):
                yield _delta(choice, tool_calls=[{"index": 0, **calls[0]}])
            yield _delta(choice) | {"finish_reason": FINISH[choice.finish_reason]}

    def _calls(self, choice: Choice) -> list[dict[str, Any]]:
        """The call of a client's function that ended the answer."""
        if choice.finish_reason != "call" or not (call := read_call(choice.parts[-1][1], self.body.names)):
            return []
        return [{"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": call.model_dump()}]

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if calls := self._calls(choice):
            message |= {"tool_calls": calls, "content": choice.text or None}
        if any(kind != "text" for kind, _ in choice.parts):
            message["parts"] = [{"type": kind, "text": text} for kind, text in choice.parts]
        logprobs = {"content": choice.entries, "refusal": None} if self.logprobs else None
        reason = FINISH[choice.finish_reason or "stop"]
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _delta(choice: Choice, logprobs: Any = None, **delta: Any) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


class CompletionReply(Reply):
    """The shape of /v1/completions."""

    kind, prefix = "text_completion", "cmpl"

    def echo(self, choice: Choice, prompt: Sequence[int], scores: Sequence[Token]) -> None:
        """Puts a prompt before a choice, with the scores of its tokens if log-probabilities are requested; the first
        token has none if nothing was before it."""
        choice.echo = self.tokenizer.decode(prompt, keep_specials=True)
        if self.logprobs:
            unknown = [Token(token, float("nan"), False) for token in prompt[: len(prompt) - len(scores)]]
            self._enter(choice, [*unknown, *scores])
        choice.characters = len(choice.echo)

    def begin(self) -> list[dict[str, Any]]:
        return [self._with(choice, choice.echo, choice.entries) for choice in self.choices if choice.echo]

    def _enter(self, choice: Choice, tokens: Sequence[Token]) -> None:
        for token in tokens:
            name, value, tops = self.named(token.id), None, None
            if not math.isnan(token.logprob):  # Known.
                value = max(token.logprob, LEAST_LOGPROB)
                tops = {name: value}
                for i, top in self.tops(token).items():
                    tops.setdefault(self.named(i), top)
            choice.entries.append((name, value, tops, choice.characters))
            data = self.tokenizer.decode_bytes([token.id], keep_specials=True)
            choice.characters += len(choice.offsets.decode(data))

    def _chunks(self, choice: Choice, pieces: list[Piece], entries: list[Any]) -> Iterator[dict[str, Any]]:
        text = "".join(text for _, text in pieces)
        if text or entries or choice.finish_reason:
            yield self._with(choice, text, entries)

    def _with(self, choice: Choice, text: str, entries: list[Any]) -> dict[str, Any]:
        logprobs = None
        if self.logprobs:
            columns = [list(column) for column in zip(*entries)] or [[], [], [], []]
            logprobs = dict(zip(("tokens", "token_logprobs", "top_logprobs", "text_offset"), columns))
        reason = FINISH[choice.finish_reason] if choice.finish_reason else None
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return self._with(choice, choice.echo + choice.text, choice.entries)
