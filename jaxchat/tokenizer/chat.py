"""Conversations as tokens: who said what, between special tokens, and which tokens the model is to learn.

Learned are the assistant's words, its tool calls and the token that ends its turn; not the user's words, not what a
tool answered, and not the token that begins the assistant's turn (nanochat's rules).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxchat.errors import UserError
from jaxchat.tokenizer.sentencepiece import Tokenizer


class Rendered(NamedTuple):
    """Token ids, and for each whether the model is to learn it."""

    ids: list[int]
    learned: list[bool]


class Malformed(UserError):
    """Messages that are no conversation; `reason` says why in words that many have in common, for counting."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


Message = Mapping[str, Any]

PARTS: Mapping[str, tuple[str, str, bool]] = {
    "text": ("", "", True),
    "python": ("<|python_start|>", "<|python_end|>", True),
    "python_output": ("<|output_start|>", "<|output_end|>", False),
}
"""Kinds of the assistant's parts: the tokens around each, and whether it is learned."""

CHAT_TEMPLATE = """\
{{- '<|bos|>' -}}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- if messages | length < 2 or messages[1]['role'] != 'user' -%}
{{- raise_exception('a system message must be followed by a user message') -}}
{%- endif -%}
{%- set before = messages[0]['content'] + '\\n\\n' if messages[0]['content'] else '' -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set before = '' -%}
{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
{{- raise_exception('user and assistant must take turns, the user first') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- '<|user_start|>' + (before if loop.first else '') + message['content'] + '<|user_end|>' -}}
{%- else -%}
{{- '<|assistant_start|>' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'python' -%}
{{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}
{%- elif part['type'] == 'python_output' -%}
{{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|assistant_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
"""
"""What `render` does, in jinja, with the special tokens spelled out: for other programs."""


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, complete: bool = False) -> Rendered:
    """A conversation of {"role": "system" | "user" | "assistant", "content": ...}, in one document.

    The assistant's content is a text, or parts {"type": "text" | "python" | "python_output", "text": ...}. A system
    message opens the first user message; an empty one is none. With `complete`, the conversation ends where the
    assistant is to speak.

    Raises:
        Malformed: roles that do not alternate from user to assistant, an unknown role or part, or no words.
    """
    special = tokenizer.specials
    turns = _turns(messages)
    said = _Said(tokenizer)
    for i, (role, content) in enumerate(turns):
        if role == "user":
            said.add([special["<|user_start|>"], *tokenizer.encode(content), special["<|user_end|>"]], False)
        else:
            said.add([special["<|assistant_start|>"]], False)
            said.answer(content, i)
    if complete:
        if turns[-1][0] != "user":
            raise UserError("the assistant can only answer a conversation that ends with the user's words")
        said.add([special["<|assistant_start|>"]], False)
    return said.rendered


def render_answer(prompt: str, content: Any, tokenizer: Tokenizer) -> Rendered:
    """A prompt as plain text, and an answer to it, with no turns: BOS prompt answer <|assistant_end|>."""
    said = _Said(tokenizer)
    said.add(tokenizer.encode(prompt), False)
    said.answer(content, 1)
    return said.rendered


def check(messages: Sequence[Message]) -> None:
    """Raises `Malformed` where `render` would."""
    for i, (role, content) in enumerate(_turns(messages)):
        if role == "assistant":
            _parts(content, i)


def parse(ids: Sequence[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The messages that `render` made these ids of; a system message stays part of the first user message.

    Ids may end anywhere: an open last turn is given as far as it goes, and one that is only begun is left out. The
    assistant's content is a text where it is one part of text, else parts.

    Raises:
        Malformed: ids in an order that no conversation has.
    """
    names = {number: name for name, number in tokenizer.specials.items()}
    begins = {begin: (kind, end) for kind, (begin, end, _) in PARTS.items() if begin}
    messages: list[dict[str, Any]] = []
    parts: list[dict[str, str]] = []
    role, kind = "", "text"
    words: list[int] = []

    def close(kind: str) -> None:
        if words or kind != "text":
            parts.append({"type": kind, "text": tokenizer.decode(words)})
            words.clear()

    def turn() -> None:
        whole = parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else [*parts]
        if parts:
            messages.append({"role": role, "content": whole})
        parts.clear()

    for i, number in enumerate(ids):
        name = names.get(number, "")
        if not name and role:
            words.append(number)
        elif name == "<|bos|>" and i == 0:
            continue
        elif not role and name in ("<|user_start|>", "<|assistant_start|>"):
            role = name[2:].removesuffix("_start|>")
        elif role and kind == "text" and name == f"<|{role}_end|>":
            close(kind)
            turn()
            role = ""
        elif role == "assistant" and kind == "text" and name in begins:
            close(kind)
            kind = begins[name][0]
        elif role == "assistant" and kind != "text" and name == PARTS[kind][1]:
            close(kind)
            kind = "text"
        else:
            raise Malformed("tokens out of order", f"token {i} of a conversation is {name or number}, out of order")
    close(kind)
    turn()
    return messages


class _Said:
    """Tokens so far."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.rendered = Rendered([tokenizer.bos], [False])
        self._tokenizer = tokenizer

    def add(self, ids: Sequence[int], learn: bool) -> None:
        self.rendered.ids.extend(ids)
        self.rendered.learned.extend([learn] * len(ids))

    def answer(self, content: Any, index: int) -> None:
        """The assistant's parts, and the end of its turn."""
        special = self._tokenizer.specials
        for kind, text in _parts(content, index):
            begin, end, learn = PARTS[kind]
            ids = self._tokenizer.encode(text)
            self.add([special[begin], *ids, special[end]] if begin else ids, learn)
        self.add([special["<|assistant_end|>"]], True)


def _turns(messages: Sequence[Message]) -> list[tuple[str, Any]]:
    """Roles and contents, the system message merged into the first user message."""
    turns = [(str(message.get("role")), message.get("content")) for message in messages]
    if turns and turns[0][0] == "system":
        if len(turns) < 2 or turns[1][0] != "user":
            raise Malformed("roles out of order", "a system message must be followed by a user message")
        (_, system), (_, words) = turns[:2]
        if not isinstance(system, str):
            raise Malformed("empty content", "the system message holds no text")
        if system and words and isinstance(words, str):
            words = f"{system}\n\n{words}"
        turns[:2] = [("user", words)]
    if not turns:
        raise Malformed("no message", "a conversation needs at least one message")
    first = len(messages) - len(turns)
    for i, (role, content) in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        where = f"message {i + first}"
        if role not in ("user", "assistant"):
            known = "only system (first), user and assistant are known"
            reason = "roles out of order" if role == "system" else "unknown role"
            raise Malformed(reason, f"{where} has the role {role!r}: {known}")
        if role != expected:
            raise Malformed("roles out of order", f"{where} is the {role}'s, and it is the {expected}'s turn")
        if not content or (role == "user" and not isinstance(content, str)):
            raise Malformed("empty content", f"{where} of the {role} holds no text")
    return turns


def _parts(content: Any, index: int) -> list[tuple[str, str]]:
    """The kinds and texts of an assistant's content."""
    if isinstance(content, str):
        return [("text", content)]
    parts = []
    for part in content if isinstance(content, Sequence) else [content]:
        kind, text = (str(part.get("type")), part.get("text")) if isinstance(part, Mapping) else ("", None)
        if kind not in PARTS or not isinstance(text, str):
            raise Malformed(
                "unknown part",
                f"message {index} has a part of type {kind!r}: known are {', '.join(PARTS)}, each with a text",
            )
        parts.append((kind, text))
    return parts
