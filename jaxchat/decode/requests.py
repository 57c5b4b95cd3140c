"""Requests to the engine, completions that it returns, and incremental conversion of tokens to text."""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import NOT_FINITE, UserError
from jaxchat.tokenizer import Tokenizer


class Tool(Protocol):
    """A function that the model calls by writing a part of the kind `call_part` of the tokenizer's chat format.

    Its output is inserted into the answer as a part of the kind `output_part`.
    """

    call_part: str
    output_part: str

    def __call__(self, call: str) -> str | None:
        """Returns the output of a call, or None to insert nothing. Raises `AnswerEnds` to end the answer there."""


class AnswerEnds(Exception):
    """Raised by a tool whose call is answered elsewhere; the sample's finish reason becomes "call"."""


class Token(NamedTuple):
    """A token of an answer, its log-probability under the model, and whether it was sampled (false for tool output);
    the most likely tokens at its place with their log-probabilities, if requested.
    """

    id: int
    logprob: float
    sampled: bool
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Request:
    """A prompt (token ids), sampling parameters, number of answers `n`, and the tools that the model may call."""

    prompt: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    tools: Sequence[Tool] = ()
    store: bool = False
    """Store the cache of prompt and answer in the prefix cache, for later prompts that begin with them."""
    return_support: bool = False
    """Return the set of tokens that each token was sampled from, for training with truncated sampling."""
    top_logprobs: int = 0
    """Number of the most likely tokens to return for each token, at most `sampling.TOP`; see `Sample.since`."""
    begun: int = 0
    """Number of the prompt's last tokens that are the beginning of the answer, such as that of a tool call."""


@dataclass(frozen=True)
class Completion:
    """The answer of one sample of a request.

    Attributes:
        text: the answer, without special tokens and without the stop text.
        shown: the same for people: tool calls and results are marked, `[9 - 4 = 5] The answer is 5.`
        tokens: its tokens, including the stop token.
        logprobs: log-probability of each token under the model; 0 for tool output.
        sampling_logprobs: log-probability of each token under the sampling distribution; 0 for tool output.
        sampled: whether each token was sampled; false for tool output.
        finish_reason: "stop" at a stop token or stop text, "length" at max_tokens, "context" when the context is full,
            "call" if a tool raised `AnswerEnds`, "cancelled", or "error".
        seconds: from submission to the end.
        first_token_seconds: from submission to the first token.
        error: why the request or a tool failed.
        support: the tokens that each token was sampled from, (tokens, ceil(V / 8)) uint8, one bit per token, lowest bit
            first; all bits are set for tool output. None if not requested, or if nothing was truncated.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    sampled: tuple[bool, ...]
    finish_reason: str
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    error: str | None = None
    shown: str = ""
    support: np.ndarray | None = field(default=None, compare=False)


def check_finite(completions: Iterable[Completion]) -> None:
    """Raises `UserError` if a model's probabilities were not finite: its answers must not be scored."""
    if any(completion.error == NOT_FINITE for completion in completions):
        raise UserError(NOT_FINITE)


# What `TextStream.shown` has at a border in an answer, by the part before it and what begins there: a call, the end of
# one, its result, the end of that, or text.
_MARKS = {
    ("", "call"): "[",
    ("call", "called"): "",
    ("called", "call"): "] [",
    ("called", "result"): " = ",
    ("called", ""): "] ",
    ("", "result"): "[= ",
    ("result", "done"): "] ",
}


class TextStream:
    """Converts tokens to text incrementally; holds back incomplete characters and text that may begin a stop text.

    `text` has no trace of special tokens; `shown`, what people see, has tool calls with results as `[9 - 4 = 5] `. A
    character that is still incomplete at the end is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text, self.shown, self.stopped = "", "", False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        self._part, self._last_mark = "", ""
        self._marks: deque[tuple[int, str]] = deque()  # Each with its place in `text`.
        self._borders = {
            tokenizer.specials[special]: name
            for marks in tokenizer.chat_format.parts.values()
            for special, name in zip(
                (marks.begin, marks.end), ("call", "called") if marks.in_loss else ("result", "done")
            )
        }

    def add(self, token: int) -> str:
        """Adds a token; returns what is new in `shown`. Sets `stopped` once a stop text is complete."""
        if self.stopped:
            return ""
        self._note(self._borders.get(token, ""))
        self._pending += self._decoder.decode(self._tokenizer.decode_bytes([token]))
        starts = [at for at in (self._pending.find(text) for text in self._stop) if at >= 0]
        if starts:
            self.stopped, certain = True, min(starts)
            self._pending = self._pending[:certain]
        else:
            certain = len(self._pending) - self._partial_stop()
        return self._release(certain)

    def finish(self) -> str:
        """Returns what was held back, at the end of the answer."""
        held = self._release(len(self._pending))
        end = "]" if self._last_mark and not self._last_mark.endswith("] ") else ""
        self.shown += end
        return held + end

    def _note(self, border: str) -> None:
        """Queues the mark at a border of parts, if there is one here."""
        mark = _MARKS.get((self._part, border))
        if mark is not None:
            self._part = "" if border == "done" else border
            self._marks.append((len(self.text) + len(self._pending), mark))

    def _release(self, certain: int) -> str:
        new, self._pending = self._pending[:certain], self._pending[certain:]
        start, at, shown = len(self.text), 0, ""
        self.text += new
        while self._marks and self._marks[0][0] <= len(self.text):
            place, mark = self._marks.popleft()
            shown += new[at : place - start] + mark
            at, self._last_mark = place - start, mark or self._last_mark
        shown += new[at:]
        self.shown += shown
        return shown

    def _partial_stop(self) -> int:
        """Number of characters at the end of the pending text that may begin a stop text."""
        most = max((len(text) for text in self._stop), default=1) - 1
        for size in range(min(most, len(self._pending)), 0, -1):
            if any(text.startswith(self._pending[-size:]) for text in self._stop):
                return size
        return 0
