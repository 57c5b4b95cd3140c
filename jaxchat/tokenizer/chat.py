"""Renders conversations as tokens: turns between special tokens, with a loss mask.

Training targets are the assistant's text, its tool calls and the token that ends its turn; not the user's text, tool
results, or the token that begins the assistant's turn (nanochat's rules).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxchat.errors import UserError
from jaxchat.tokenizer.sentencepiece import Tokenizer


class Rendered(NamedTuple):
    """Token ids of a conversation, and its loss mask: `learned` is true for training targets."""

    ids: list[int]
    learned: list[bool]


class Malformed(UserError):
    """Messages that do not form a conversation; `reason` is the category under which it is counted."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


Message = Mapping[str, Any]

PARTS: Mapping[str, tuple[str, str, bool]] = {
    "text": ("", "", True),
    "python": ("<|python_start|>", "<|python_end|>", True),
    "python_output": ("<|output_start|>", "<|output_end|>", False),
}
"""Kinds of assistant parts: the tokens before and after each, and whether it is a training target."""

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
"""The format of `render` as a Jinja template with special tokens spelled out, for other programs."""


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, complete: bool = False) -> Rendered:
    """Renders messages {"role": "system" | "user" | "assistant", "content": ...} as one document.

    The assistant's content is a string or a list of {"type": "text" | "python" | "python_output", "text": ...}. A
    nonempty system message is prepended to the first user message. With `complete`, the ids end with the token that
    begins the assistant's next turn.

    Raises:
        Malformed: roles do not alternate from user to assistant, a role or part is unknown, or a message is empty.
        UserError: with `complete`, the last message is not the user's.
    """
    special = tokenizer.specials
    turns = _turns(messages)
    tokens = _Tokens(tokenizer)
    for i, (role, content) in enumerate(turns):
        if role == "user":
            tokens.add([special["<|user_start|>"], *tokenizer.encode(content), special["<|user_end|>"]], False)
        else:
            tokens.add([special["<|assistant_start|>"]], False)
            tokens.add_answer(content, i)
    if complete:
        if turns[-1][0] != "user":
            raise UserError("the assistant can only answer a conversation that ends with a user message")
        tokens.add([special["<|assistant_start|>"]], False)
    return tokens.rendered


def render_answer(prompt: str, content: Any, tokenizer: Tokenizer) -> Rendered:
    """Renders a plain-text prompt and its answer without turns: BOS prompt answer <|assistant_end|>."""
    tokens = _Tokens(tokenizer)
    tokens.add(tokenizer.encode(prompt), False)
    tokens.add_answer(content, 1)
    return tokens.rendered


def check(messages: Sequence[Message]) -> None:
    """Raises `Malformed` if `render` would."""
    for i, (role, content) in enumerate(_turns(messages)):
        if role == "assistant":
            _parts(content, i)


def parse(ids: Sequence[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Inverts `render`: returns the messages of ids; a system message stays part of the first user message.

    Ids may end anywhere: an incomplete last turn is returned as far as it goes, and omitted if it is empty. The
    assistant's content is a string if it is a single text part, else a list of parts.

    Raises:
        Malformed: the special tokens are in an order that `render` never produces.
    """
    names = {number: name for name, number in tokenizer.specials.items()}
    begins = {begin: (kind, end) for kind, (begin, end, _) in PARTS.items() if begin}
    messages: list[dict[str, Any]] = []
    parts: list[dict[str, str]] = []
    role, kind = "", "text"
    part_ids: list[int] = []

    def end_part(kind: str) -> None:
        if part_ids or kind != "text":
            parts.append({"type": kind, "text": tokenizer.decode(part_ids)})
            part_ids.clear()

    def end_turn() -> None:
        content = parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else [*parts]
        if parts:
            messages.append({"role": role, "content": content})
        parts.clear()

    for i, number in enumerate(ids):
        name = names.get(number, "")
        if not name and role:
            part_ids.append(number)
        elif name == "<|bos|>" and i == 0:
            continue
        elif not role and name in ("<|user_start|>", "<|assistant_start|>"):
            role = name[2:].removesuffix("_start|>")
        elif role and kind == "text" and name == f"<|{role}_end|>":
            end_part(kind)
            end_turn()
            role = ""
        elif role == "assistant" and kind == "text" and name in begins:
            end_part(kind)
            kind = begins[name][0]
        elif role == "assistant" and kind != "text" and name == PARTS[kind][1]:
            end_part(kind)
            kind = "text"
        else:
            raise Malformed("tokens out of order", f"token {i} of a conversation is {name or number}, out of order")
    end_part(kind)
    end_turn()
    return messages


class _Tokens:
    """Collects the ids and loss mask of a conversation; starts with BOS."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.rendered = Rendered([tokenizer.bos], [False])
        self._tokenizer = tokenizer

    def add(self, ids: Sequence[int], learn: bool) -> None:
        self.rendered.ids.extend(ids)
        self.rendered.learned.extend([learn] * len(ids))

    def add_answer(self, content: Any, index: int) -> None:
        """Adds the assistant's parts and the token that ends its turn."""
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
        (_, system), (_, content) = turns[:2]
        if not isinstance(system, str):
            raise Malformed("empty content", "the system message has no text")
        if system and content and isinstance(content, str):
            content = f"{system}\n\n{content}"
        turns[:2] = [("user", content)]
    if not turns:
        raise Malformed("no message", "a conversation needs at least one message")
    first = len(messages) - len(turns)
    for i, (role, content) in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        where = f"message {i + first}"
        if role not in ("user", "assistant"):
            supported = "expected user or assistant, or system in the first message"
            reason = "roles out of order" if role == "system" else "unknown role"
            raise Malformed(reason, f"{where} has the role {role!r}; {supported}")
        if role != expected:
            raise Malformed("roles out of order", f"{where} has the role {role!r}; expected {expected!r}")
        if not content or (role == "user" and not isinstance(content, str)):
            raise Malformed("empty content", f"{where}, of the {role}, has no text")
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
                f"message {index} has a part of type {kind!r}; expected one of {', '.join(PARTS)}, with a text",
            )
        parts.append((kind, text))
    return parts
