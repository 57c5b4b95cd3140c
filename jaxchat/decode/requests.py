"""What is asked of the engine and what comes back: requests, answers, and text that grows token by token."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from jaxchat.decode.sampling import SamplingParams
from jaxchat.tokenizer import Tokenizer


class Tool(Protocol):
    """Something the model may call: from `begin` on until `end` the text is the call, answered between two tokens.

    Its answer is forced into the text, so the model reads what it did not write.
    """

    @property
    def begin(self) -> str: ...

    @property
    def end(self) -> str: ...

    @property
    def answer_begin(self) -> str: ...

    @property
    def answer_end(self) -> str: ...

    def __call__(self, call: str) -> str | None:
        """The answer to a call, or None for no answer."""


@dataclass(frozen=True)
class Request:
    """A prompt in tokens, how many answers it gets, how they are sampled, and which tools they may call."""

    prompt: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    tools: Sequence[Tool] = ()
    keep: bool = False
    """Whether the engine remembers what it read, for a later prompt that begins with it."""
    return_support: bool = False
    """Whether the answer says which tokens each of its own was drawn from, for training on it."""


@dataclass(frozen=True)
class Completion:
    """What one sample of a request got.

    Attributes:
        text: the answer, without special tokens and without the stop text.
        tokens: its tokens, the end token included.
        logprobs: the model's log-probability of each token.
        sampling_logprobs: each token's log-probability under the distribution it was drawn from.
        sampled: whether each token was chosen by the model; those of a tool's answer were not.
        finish_reason: "stop" at an end token or stop text, "length" at max_tokens, "context" when the context is full,
            "cancelled", or "error".
        seconds: from submission to the end.
        first_token_seconds: from submission to the first token.
        top_logprobs: for each sampled token, the most likely tokens and their log-probabilities, where asked for.
        error: what was wrong with the request.
        support: the tokens that each token was sampled from, (tokens, ceil(V / 8)) uint8, one bit per token, lowest bit
            first; all bits are set for a token of a tool's answer. None if not requested, or if nothing was truncated.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    sampled: tuple[bool, ...]
    finish_reason: str
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    error: str | None = None
    support: np.ndarray | None = field(default=None, compare=False)


class TextStream:
    """Text from tokens as they come: never half a character, never a part of what may become a stop text.

    A character whose bytes never end is left out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain now; `stopped` is set once a stop text is complete."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(self._tokenizer.decode_bytes([token]))
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            self.stopped, certain = True, min(found)
            self._held = self._held[:certain]
        else:
            certain = len(self._held) - self._undecided()
        return self._release(certain)

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        return self._release(len(self._held))

    def _release(self, certain: int) -> str:
        new, self._held = self._held[:certain], self._held[certain:]
        self.text += new
        return new

    def _undecided(self) -> int:
        """How many of the last characters may begin a stop text."""
        most = max((len(text) for text in self._stop), default=1) - 1
        for size in range(min(most, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-size:]) for text in self._stop):
                return size
        return 0
