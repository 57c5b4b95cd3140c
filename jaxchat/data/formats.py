"""Formats of data: what is read from a source, and how it becomes tokens. `--data.format` names a row of `FORMATS`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jaxchat.data import conversations
from jaxchat.data.conversations import alpaca_prompt
from jaxchat.data.messages import Message, Note, silent
from jaxchat.data.packing import Packed, Rule, pack, pack_whole
from jaxchat.data.source import Content, Reading, Source
from jaxchat.data.sources import KINDS, documents
from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer, chat
from jaxchat.tokenizer.chat import Malformed, Rendered

Skip = Callable[[Any, Malformed, Callable[[], str]], None]
"""Called with a skipped row, the reason, and a function that returns its file and line or row."""


class Example(NamedTuple):
    """A document or conversation: the text that decides its split, all of its text, the value to encode, what was not
    read as it stands, each a phrase that follows "3 conversations", and a function that returns its file and row."""

    opening: str
    text: str
    value: Any
    notes: Sequence[str] = ()
    where: Callable[[], str] = str


class Text:
    """Documents, which are split into rows by any rule of packing."""

    content: Content = "documents"
    noun = "document"

    def examples(self, source: Source, reading: Reading, skip: Skip) -> Iterator[Example]:
        """Yields the documents of one part of a source in a fixed order."""
        return (Example(text, text, text) for text in documents(source, reading))

    def encode(self, text: str, tokenizer: Tokenizer, everything: bool = False) -> Rendered:
        """Token ids of a document without BOS, and no loss mask, because every token is a target."""
        return Rendered(tokenizer.encode(text), [])

    def answers(self, text: str) -> int:
        """Number of answers in what `encode` takes."""
        return 0

    def pack(self, block: Sequence[Any], row_length: int, rule: Rule, *, bos: int, dtype: np.dtype) -> Packed:
        """Rows (R, row_length + 1) of a block of (ids, loss mask) pairs that `encode` made."""
        return pack([ids for ids, _ in block], row_length, rule, bos=bos, dtype=dtype)


class Chat:
    """Conversations as turns, each whole in one row. Another template is a subclass."""

    content: Content = "objects"
    noun = "conversation"
    columns = conversations.COLUMNS
    """Keys of a row that `read` uses; others are not read from parquet."""

    def read(self, row: Any, note: Note = silent) -> list[Message]:
        """The messages of a row of any layout, see `conversations.read`."""
        return conversations.read(row, note)

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer, everything: bool = False) -> Rendered:
        """Token ids and loss mask of messages that `read` returned; `everything`: of the user's too."""
        return chat.render(messages, tokenizer, everything=everything)

    def answers(self, messages: Sequence[Message]) -> int:
        return sum(message["role"] == "assistant" for message in messages)

    def examples(self, source: Source, reading: Reading, skip: Skip) -> Iterator[Example]:
        """Yields the conversations of one part of a source in a fixed order; calls `skip` for malformed ones."""
        kind = KINDS[source.kind]
        for number, row in kind.objects(source, reading, self.columns):
            notes: dict[str, None] = {}
            where = partial(kind.location, source, reading, number)
            try:
                messages = self.read(row, notes.setdefault)
            except Malformed as error:
                skip(row, error, where)
            except UserError as error:
                raise UserError(f"{where()} {error}") from None
            else:
                opening, words = conversations.opening(messages), conversations.words(messages)
                yield Example(opening, words, messages, list(notes), where)

    def pack(self, block: Sequence[Any], row_length: int, rule: Rule, *, bos: int, dtype: np.dtype) -> Packed:
        return pack_whole(block, row_length, bos=bos, dtype=dtype)


class Alpaca(Chat):
    """Single questions in the Alpaca template, after any system message, and their answers, without turns."""

    def read(self, row: Any, note: Note = silent) -> list[Message]:
        """A user message that holds the filled-in template, and the assistant's answer."""
        messages = super().read(row, note)
        *before, question, answer = messages
        if len(messages) > 2 and not (len(messages) == 3 and before[0]["role"] == "system"):
            raise Malformed(
                "several turns", f"{len(messages)} messages, but the Alpaca template has one question and answer"
            )
        instruction, context = conversations.instruction(row) or (question["content"], "")
        instruction = "\n\n".join([*(message["content"] for message in before), instruction])
        prompt = dict(role="user", content=alpaca_prompt(instruction, context))
        return [{key: value for message in messages[:-1] for key, value in message.items()} | prompt, answer]

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer, everything: bool = False) -> Rendered:
        return chat.render_answer(messages, tokenizer, everything=everything)


FORMATS: Mapping[str, Text | Chat] = {"text": Text(), "chat": Chat(), "alpaca": Alpaca()}
if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[tuple(FORMATS)]
