"""Conversations as tokens: who said what, between special tokens, and which tokens the model is to learn.

Learned are the assistant's words, its tool calls and the token that ends its turn; not the user's words, not what a
tool answered, and not the token that begins the assistant's turn (nanochat's rules).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxchat.config import UserError
from jaxchat.tokenizer.sentencepiece import Tokenizer


class Rendered(NamedTuple):
    """Token ids, and for each whether the model is to learn it."""

    ids: list[int]
    learned: list[bool]


Message = Mapping[str, Any]


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, complete: bool = False) -> Rendered:
    """A conversation of {"role": "system" | "user" | "assistant", "content": ...}, in one document.

    The assistant's content is a text, or parts {"type": "text" | "python" | "python_output", "text": ...}. A system
    message opens the first user message. With `complete`, the conversation ends where the assistant is to speak.

    Raises:
        UserError: roles that do not alternate from user to assistant, an unknown role or part, or no words.
    """
    special = tokenizer.specials
    turns = _turns(messages)
    ids, learned = [tokenizer.bos], [False]

    def say(tokens: Sequence[int], learn: bool) -> None:
        ids.extend(tokens)
        learned.extend([learn] * len(tokens))

    for i, (role, content) in enumerate(turns):
        if role == "user":
            say([special["<|user_start|>"], *tokenizer.encode(content), special["<|user_end|>"]], False)
            continue
        say([special["<|assistant_start|>"]], False)
        for kind, text in _parts(content, i):
            begin, end, learn = _PARTS[kind]
            tokens = tokenizer.encode(text)
            say([special[begin], *tokens, special[end]] if begin else tokens, learn)
        say([special["<|assistant_end|>"]], True)
    if complete:
        if turns[-1][0] != "user":
            raise UserError("the assistant can only answer a conversation that ends with the user's words")
        say([special["<|assistant_start|>"]], False)
    return Rendered(ids, learned)


_PARTS: Mapping[str, tuple[str, str, bool]] = {
    "text": ("", "", True),
    "python": ("<|python_start|>", "<|python_end|>", True),
    "python_output": ("<|output_start|>", "<|output_end|>", False),
}


def _turns(messages: Sequence[Message]) -> list[tuple[str, Any]]:
    """Roles and contents, the system message merged into the first user message."""
    turns = [(str(message.get("role")), message.get("content")) for message in messages]
    if turns and turns[0][0] == "system":
        if len(turns) < 2 or turns[1][0] != "user":
            raise UserError("a system message must be followed by a user message")
        turns[:2] = [("user", f"{turns[0][1]}\n\n{turns[1][1]}")]
    if not turns:
        raise UserError("a conversation needs at least one message")
    for i, (role, content) in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if role not in ("user", "assistant"):
            raise UserError(f"message {i} has the role {role!r}: only system (first), user and assistant are known")
        if role != expected:
            raise UserError(f"message {i} is the {role}'s, and it is the {expected}'s turn")
        if not content or (role == "user" and not isinstance(content, str)):
            raise UserError(f"message {i} of the {role} holds no text")
    return turns


def _parts(content: Any, index: int) -> list[tuple[str, str]]:
    """The kinds and texts of an assistant's content."""
    if isinstance(content, str):
        return [("text", content)]
    parts = []
    for part in content:
        kind, text = part.get("type"), part.get("text")
        if kind not in _PARTS or not isinstance(text, str):
            raise UserError(
                f"message {index} has a part of type {kind!r}: known are {', '.join(_PARTS)}, each with a text"
            )
        parts.append((kind, text))
    return parts
