"""The chat format: the special tokens of a tokenizer and what they mean. No other file names a special token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jaxchat.errors import UserError


class Rendered(NamedTuple):
    """Token ids of a conversation, and its loss mask, true for training targets."""

    ids: list[int]
    loss_mask: list[bool]


class Malformed(UserError):
    """Messages that do not form a conversation; `reason` is the category under which it is counted."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True)
class Marks:
    """Special tokens around a turn, or a part of one, and whether they and the text between them are training targets.

    The token that begins a turn never is a target, because prompts end with it.
    """

    begin: str
    end: str
    in_loss: bool


@dataclass(frozen=True)
class ChatFormat:
    """How special tokens structure a conversation.

    Attributes:
        bos: first token of every document.
        turns: marks of the turns of "user" and "assistant".
        parts: marks of the kinds of parts, other than text, that a turn of the assistant may have.
    """

    bos: str
    turns: Mapping[str, Marks]
    parts: Mapping[str, Marks]

    @property
    def specials(self) -> tuple[str, ...]:
        """Every special token of the format, in the order of their ids."""
        marks = (*self.turns.values(), *self.parts.values())
        return tuple(dict.fromkeys([self.bos, *(name for mark in marks for name in (mark.begin, mark.end))]))

    @property
    def end(self) -> str:
        """The token that ends the assistant's turn."""
        return self.turns["assistant"].end

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ChatFormat":
        """Inverts `dataclasses.asdict`."""
        turns, parts = ({kind: Marks(**marks) for kind, marks in value[name].items()} for name in ("turns", "parts"))
        return cls(value["bos"], turns, parts)


NANOCHAT = ChatFormat(
    bos="<|bos|>",
    turns={
        "user": Marks("<|user_start|>", "<|user_end|>", in_loss=False),
        "assistant": Marks("<|assistant_start|>", "<|assistant_end|>", in_loss=True),
    },
    parts={
        "python": Marks("<|python_start|>", "<|python_end|>", in_loss=True),
        "python_output": Marks("<|output_start|>", "<|output_end|>", in_loss=False),
    },
)
"""nanochat's format: the default, and that of tokenizers that were saved without a format."""

CHAT_FORMATS: Mapping[str, ChatFormat] = {"nanochat": NANOCHAT}
PARTS = tuple({kind: None for chat_format in CHAT_FORMATS.values() for kind in chat_format.parts})
"""Kinds of parts that a conversation may have before its tokenizer, and so its format, is known."""
if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(CHAT_FORMATS)]
