"""A conversation with the engine: turns that are remembered, and left out, oldest first, where the context is full."""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from jaxchat.decode.engine import Engine
from jaxchat.decode.requests import Request, Tool
from jaxchat.decode.sample import Sample
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.tokenizer import chat

HELP = "/clear forgets the conversation, /save FILE adds it to a file, /help says this, an empty line or Ctrl-D ends"


class Dialogue:
    """Messages so far; `answer` takes the user's words and gives the assistant's, piece by piece."""

    def __init__(self, engine: Engine, sampling: SamplingParams, tools: Sequence[Tool] = (), *, room: int = 32) -> None:
        self.messages: list[dict[str, Any]] = []
        self.left_out = 0
        """Messages that the last answer could not see."""
        self.last: Sample | None = None
        self._engine, self._sampling, self._tools = engine, sampling, tuple(tools)
        self._room = min(room, sampling.max_tokens)

    def answer(self, words: str) -> Iterator[str]:
        """The assistant's answer as it comes. Raises UserError for words too long to be answered at all."""
        said = [*self.messages, {"role": "user", "content": words}]
        prompt = self._fit(said)
        (sample,) = self._engine.submit(Request(prompt, self._sampling, tools=self._tools, keep=True))
        self.last = sample
        yield from self._engine.follow(sample)
        self.messages = [*said, {"role": "assistant", "content": self._content(sample)}]

    def _content(self, sample: Sample) -> Any:
        """What was said, in parts where a tool was called, so that it is read again as it was written."""
        text = sample.completion().text
        try:
            content = chat.parse([*sample.prompt, *sample.tokens], self._engine.tokenizer)[-1]["content"]
        except chat.Malformed:
            return text or "..."
        if isinstance(content, list) and "".join(part["text"] for part in content) == text:
            return content
        return text or "..."

    def stop(self) -> None:
        """Ends the answer that is being given; what was said so far is remembered."""
        if self.last is not None:
            self.last.cancel()

    def _fit(self, said: Sequence[dict[str, Any]]) -> list[int]:
        """The conversation in tokens, without its oldest turns where it would leave no room for an answer."""
        for first in range(0, len(said), 2):
            ids = chat.render(said[first:], self._engine.tokenizer, complete=True).ids
            if len(ids) + self._room <= self._engine.shape.length:
                self.left_out = first
                return ids
        raise UserError(
            f"these words take {len(ids)} tokens with their turn, and the context has {self._engine.shape.length}: "
            "shorten them"
        )

    def clear(self) -> None:
        self.messages, self.left_out = [], 0

    def save(self, path: str) -> None:
        """Adds the messages to a file as one line of JSON, as SFT reads them. Raises UserError where it cannot."""
        if not self.messages:
            raise UserError("there is nothing to save yet: say something first")
        try:
            with Path(path).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except (OSError, ValueError, RuntimeError) as error:  # A path may hold no NUL; ~ may be nobody's.
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"cannot write {path}: {reason}; give another path to /save") from None


def talk(dialogue: Dialogue, lines: Iterator[str], out: TextIO, notes: TextIO) -> None:
    """Reads the user's words line by line until an empty one; answers go to `out`, all else to `notes`."""
    for line in lines:
        words = line.strip()
        if not words:
            return
        command, _, argument = words.partition(" ")
        try:
            if command == "/clear":
                dialogue.clear()
                print("forgotten", file=notes)
            elif command == "/save":
                if not argument.strip():
                    raise UserError("/save needs a file: /save talk.jsonl")
                dialogue.save(argument.strip())
                print(f"saved to {argument.strip()}", file=notes)
            elif command.startswith("/"):
                print(HELP if command == "/help" else f"{command} is unknown; {HELP}", file=notes)
            else:
                _answer(dialogue, words, out, notes)
        except UserError as error:
            print(error, file=notes)


def _answer(dialogue: Dialogue, words: str, out: TextIO, notes: TextIO) -> None:
    if show(dialogue.answer(words), out, dialogue.stop):
        print("(stopped)", file=notes)
    if dialogue.left_out:
        print(f"({dialogue.left_out} earlier messages no longer fit the context and were not seen)", file=notes)


def show(pieces: Iterator[str], out: TextIO, stop: Callable[[], None]) -> bool:
    """Prints a text as it comes, and says whether it was stopped: Ctrl-C calls `stop`, a second one interrupts at once.

    An exception in the middle of a step would leave the engine without its cache.
    """
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        stop()

    before = signal.signal(signal.SIGINT, note)
    try:
        for prefill_chunk in pieces:
            print(prefill_chunk, end="", file=out, flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    print(file=out, flush=True)
    return bool(asked)
