"""A conversation with the engine. When the context is full, the oldest turns are left out of the prompt."""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from jaxchat import signals
from jaxchat.decode.engine import Engine
from jaxchat.decode.requests import Request, Tool
from jaxchat.decode.sample import Sample
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.paths import user_path
from jaxchat.tokenizer import chat

HELP = "/clear starts anew, /save FILE appends the conversation to FILE, /help shows this, an empty line or Ctrl-D ends"
ROOM = 32  # Context tokens that a prompt must leave free for the answer, or `max_tokens` if that is less.


class Dialogue:
    """The messages of a conversation so far; `answer` adds the user's next message and streams the reply."""

    def __init__(self, engine: Engine, sampling: SamplingParams, tools: Sequence[Tool] = ()) -> None:
        self.messages: list[dict[str, Any]] = []
        self.left_out = 0
        """Number of messages left out of the last prompt."""
        self.last: Sample | None = None
        self._engine, self._sampling, self._tools = engine, sampling, tuple(tools)

    def answer(self, text: str) -> Iterator[str]:
        """Yields the text of the answer as it is decoded. Raises `UserError` if the message is too long."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._fit(messages)
        (sample,) = self._engine.submit(Request(prompt, self._sampling, tools=self._tools, store=True))
        self.last = sample
        yield from self._engine.follow(sample)
        self.messages = [*messages, {"role": "assistant", "content": self._content(sample)}]

    def _content(self, sample: Sample) -> Any:
        """Message content of an answer: a list of parts if a tool was called, so that it renders to the same tokens."""
        text = sample.completion().text
        try:
            content = chat.parse([*sample.prompt, *sample.tokens], self._engine.tokenizer)[-1]["content"]
        except chat.Malformed:
            return text or "..."
        if isinstance(content, list) and "".join(part["text"] for part in content) == text:
            return content
        return text or "..."

    def stop(self) -> None:
        """Ends the current answer; the text decoded so far stays in the conversation."""
        if self.last is not None:
            self.last.cancel()

    def _fit(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of the conversation, without the oldest turns if they would leave no room for an answer."""
        room = min(ROOM, self._sampling.max_tokens)
        for first in range(0, len(messages), 2):
            ids = chat.render(messages[first:], self._engine.tokenizer, complete=True).ids
            if len(ids) + room <= self._engine.shape.length:
                self.left_out = first
                return ids
        raise UserError(
            f"the message takes {len(ids)} tokens, which leaves no room for an answer in the context of "
            f"{self._engine.shape.length}: shorten it"
        )

    def clear(self) -> None:
        self.messages, self.left_out = [], 0

    def save(self, path: str) -> None:
        """Appends the messages to a file as one line of JSON, in the format of SFT data; `UserError` if it fails."""
        if not self.messages:
            raise UserError("there is nothing to save yet: send a message first")
        try:
            with user_path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except (OSError, ValueError) as error:  # ValueError: NUL in a path.
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"cannot write {path}: {reason}; give another path to /save") from None


def talk(
    dialogue: Dialogue, lines: Iterator[str], out: TextIO, notes: TextIO, *, echo: bool = False, notice: str = ""
) -> None:
    """Answers messages and runs commands, one per line, until an empty line; all but answers goes to `notes`.

    `notes` also gets the name of each speaker and, with `echo`, the lines. `notice` precedes the second answer.
    """
    while True:
        print("you: ", end="", file=notes, flush=True)
        text = next(lines, "").strip()
        if echo or not text:
            print(text, file=notes)
        if not text:
            return
        command, _, argument = text.partition(" ")
        try:
            if command == "/clear":
                dialogue.clear()
                print("new conversation", file=notes)
            elif command == "/save":
                if not argument.strip():
                    raise UserError("/save needs a file name, such as /save talk.jsonl")
                dialogue.save(argument.strip())
                print(f"saved to {argument.strip()}", file=notes)
            elif command.startswith("/"):
                print(HELP if command == "/help" else f"{command} is unknown; {HELP}", file=notes)
            else:
                if notice and dialogue.messages:
                    print(notice, file=notes)
                    notice = ""
                print("model: ", end="", file=notes, flush=True)
                if show(dialogue.answer(text), out, dialogue.stop):
                    print("(stopped)", file=notes)
                if left_out := dialogue.left_out:
                    print(f"({left_out} earlier messages did not fit the context and were left out)", file=notes)
        except UserError as error:
            print(error, file=notes)


def show(texts: Iterator[str], out: TextIO, stop: Callable[[], None]) -> bool:
    """Prints a stream of text; returns whether Ctrl-C stopped it, which calls `stop`. A second one ends the process."""
    with signals.deferred():  # The sample is cancelled, instead of an exception in the middle of a step.
        for text in texts:
            print(text, end="", file=out, flush=True)
            if signals.received():
                stop()
    print(file=out, flush=True)
    stopped = set(signals.received()) == {signal.SIGINT}
    if stopped:
        signals.forget()
    return stopped
