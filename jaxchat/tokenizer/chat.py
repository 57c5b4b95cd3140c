"""Renders conversations as tokens: turns between special tokens, with a loss mask.

Training targets are the assistant's text, its tool calls and the token that ends its turn; not the user's text, tool
results, or the token that begins the assistant's turn (nanochat's rules). A message or part with {"in_loss": False} is
not a target, and neither is the end of a turn whose last part is not one: a model should not learn to stop after a
tool result.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxchat.errors import UserError
from jaxchat.tokenizer.chat_format import PARTS, ChatFormat, Malformed, Rendered
from jaxchat.tokenizer.outside import Outside
from jaxchat.tokenizer.protocol import Tokenizer
from jaxchat.tokenizer.template import JinjaFormat, template

Message = Mapping[str, Any]
Part = tuple[str, str, bool]  # Kind, text, and whether it may be a training target.


def written(chat_format: ChatFormat) -> JinjaFormat:
    """A chat format as its template, which writes conversations as text."""
    if isinstance(chat_format, JinjaFormat):
        return chat_format
    bos, end = chat_format.bos, chat_format.end
    return JinjaFormat(bos, {}, {}, template(chat_format), end, {"bos_token": bos, "eos_token": end})


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, *, complete: bool = False, everything: bool = False
) -> Rendered:
    """Renders messages {"role": "system" | "user" | "assistant", "content": ...} as one document.

    The assistant's content is a string or a list of {"type": "text" | "python" | "python_output", "text": ...}. A
    nonempty system message is prepended to the first user message. With `complete`, the ids end with the token that
    begins the assistant's next turn. With `everything`, all tokens are targets except BOS and those of messages or
    parts with {"in_loss": False}. The chat template of an imported model writes conversations in its own way.

    Raises:
        Malformed: roles do not alternate from user to assistant, a role or part is unknown, or a message is empty.
        UserError: with `complete`, the last message is not the user's.
    """
    turns = check(messages, tokenizer.chat_format.parts)
    if complete and turns[-1][0] != "user":
        raise UserError("the assistant can only answer a conversation that ends with a user message")
    if isinstance(tokenizer, Outside) and tokenizer.templated:
        return tokenizer.render(list(map(_plain, messages)), complete=complete, everything=everything)
    segments = [([tokenizer.bos], False)]
    for role, parts in turns:
        segments += _turn(role, parts, tokenizer, everything)
    if complete:
        segments.append(([tokenizer.specials[tokenizer.chat_format.turns["assistant"].begin]], False))
    return _joined(segments)


def asked(text: str, tokenizer: Tokenizer, *, in_turns: bool) -> list[int]:
    """Token ids that ask a chat model something; unless `in_turns`, those of a text that a base model continues."""
    if in_turns:
        return render([{"role": "user", "content": text}], tokenizer, complete=True).ids
    return [tokenizer.bos, *tokenizer.encode(text)]


def encode(text: str, tokenizer: Tokenizer, *, begin: bool) -> list[int]:
    """Token ids of a text, with BOS in front if `begin`; names of special tokens are letters. In a text that begins
    with the name of BOS, as a conversation rendered by `template` does, they are special tokens; with an imported
    model's tokenizer, in a text that begins with any.
    """
    if isinstance(tokenizer, Outside) and text.startswith(tuple(tokenizer.specials)):
        return [token.id for token in tokenizer.encode_named(text)]
    if not text.startswith(tokenizer.chat_format.bos):
        return [tokenizer.bos] * begin + tokenizer.encode(text)
    parts = re.split("(" + "|".join(map(re.escape, tokenizer.specials)) + ")", text)
    ids = ([tokenizer.specials[part]] if part in tokenizer.specials else tokenizer.encode(part) for part in parts)
    return [number for part in ids for number in part]


def render_answer(messages: Sequence[Message], tokenizer: Tokenizer, *, everything: bool = False) -> Rendered:
    """Renders a user message and its answer without turns; the answer ends as the assistant's turn does."""
    (_, ((_, prompt, in_loss),)), (_, parts) = check(messages, tokenizer.chat_format.parts)
    if isinstance(tokenizer, Outside) and tokenizer.templated:
        answer = [(tokenizer.encode(text), target) for _, text, target in parts] + [([tokenizer.end], parts[-1][2])]
    else:
        _, *answer = _turn("assistant", parts, tokenizer, everything)
    return _joined([([tokenizer.bos], False), (tokenizer.encode(prompt), everything and in_loss), *answer])


def check(messages: Sequence[Message], parts: Iterable[str] = PARTS) -> list[tuple[str, list[Part]]]:
    """Returns role and parts of every turn, the system message merged into the first; `Malformed` as in `render`.

    `parts` are the kinds of parts, other than text, that an answer may have: by default those of any chat format.
    """
    return [
        (role, _parts(content, i, ("text", *parts), *in_loss))
        for i, (role, content, *in_loss) in enumerate(_turns(messages))
    ]


def parse(ids: Sequence[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Inverts `render`: returns the messages of ids; a system message stays part of the first user message.

    Ids may end anywhere: an incomplete last turn is returned as far as it goes, and omitted if it is empty. The
    assistant's content is a string if it is a single text part, else a list of parts.

    Raises:
        Malformed: the special tokens are in an order that `render` never produces.
    """
    form, names = tokenizer.chat_format, {number: name for name, number in tokenizer.specials.items()}
    roles = {marks.begin: role for role, marks in form.turns.items()}
    kinds = {marks.begin: kind for kind, marks in form.parts.items()}
    turns: list[tuple[str, list[dict[str, str]]]] = []
    role, kind = "", "text"
    part_ids: list[int] = []

    def end_part() -> None:
        if part_ids or kind != "text":
            turns[-1][1].append({"type": kind, "text": tokenizer.decode(part_ids)})
            part_ids.clear()

    for i, number in enumerate(ids):
        name = names.get(number, "")
        if not name and role:
            part_ids.append(number)
        elif name == form.bos and i == 0:
            continue
        elif not role and name in roles:
            role = roles[name]
            turns.append((role, []))
        elif role and kind == "text" and name == form.turns[role].end:
            end_part()
            role = ""
        elif role == "assistant" and kind == "text" and name in kinds:
            end_part()
            kind = kinds[name]
        elif kind != "text" and name == form.parts[kind].end:
            end_part()
            kind = "text"
        else:
            raise Malformed("tokens out of order", f"token {i} of a conversation is {name or number}, out of order")
    end_part()
    simple = lambda parts: len(parts) == 1 and parts[0]["type"] == "text"  # noqa: E731
    return [{"role": role, "content": parts[0]["text"] if simple(parts) else parts} for role, parts in turns if parts]


def _plain(message: Message) -> Message:
    """A message of text parts with their text as its content; it is a target if all of them are."""
    content, in_loss = message["content"], message.get("in_loss", True)
    if not isinstance(content, str):
        in_loss = in_loss and all(part.get("in_loss", True) for part in content)
        content = "".join(part["text"] for part in content)
    return {"role": message["role"], "content": content, "in_loss": in_loss}


def _turn(role: str, parts: Sequence[Part], tokenizer: Tokenizer, everything: bool) -> Iterator[tuple[list[int], bool]]:
    """The tokens of a turn in segments, each with its loss mask; the first begins the turn."""
    special, turn = tokenizer.specials, tokenizer.chat_format.turns[role]
    yield [special[turn.begin]], everything and parts[0][2]
    in_loss = False
    for kind, text, target in parts:
        ids = tokenizer.encode(text)
        marks = turn if kind == "text" else tokenizer.chat_format.parts[kind]
        in_loss = target and (marks.in_loss or everything)
        yield ids if kind == "text" else [special[marks.begin], *ids, special[marks.end]], in_loss
    yield [special[turn.end]], in_loss


def _joined(segments: Sequence[tuple[list[int], bool]]) -> Rendered:
    return Rendered(
        [number for ids, _ in segments for number in ids], [in_loss for ids, in_loss in segments for _ in ids]
    )


def _turns(messages: Sequence[Message]) -> list[tuple[str, Any, bool]]:
    """Role, content and `in_loss` of each turn, the system message merged into the first user message."""
    turns = [(str(message.get("role")), message.get("content"), message.get("in_loss", True)) for message in messages]
    if turns and turns[0][0] == "system":
        if len(turns) < 2 or turns[1][0] != "user":
            raise Malformed("roles out of order", "a system message must be followed by a user message")
        (_, system, *first), (_, content, *second) = turns[:2]
        if not isinstance(system, str):
            raise Malformed("empty content", "the system message has no text")
        if system and content and isinstance(content, str):
            content = f"{system}\n\n{content}"
        turns[:2] = [("user", content, all(first + second))]
    if not turns:
        raise Malformed("no message", "a conversation needs at least one message")
    merged = len(messages) - len(turns)
    for i, (role, content, _) in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        where = f"message {i + merged}"
        if role not in ("user", "assistant"):
            supported = "expected user or assistant, or system in the first message"
            reason = "roles out of order" if role == "system" else "unknown role"
            raise Malformed(reason, f"{where} has the role {role!r}; {supported}")
        if role != expected:
            raise Malformed("roles out of order", f"{where} has the role {role!r}; expected {expected!r}")
        if not content or (role == "user" and not isinstance(content, str)):
            raise Malformed("empty content", f"{where}, of the {role}, has no text")
    return turns


def _parts(content: Any, index: int, kinds: Sequence[str], in_loss: bool) -> list[Part]:
    if isinstance(content, str):
        return [("text", content, in_loss)]
    parts = []
    for part in content if isinstance(content, Sequence) else [content]:
        kind, text = (str(part.get("type")), part.get("text")) if isinstance(part, Mapping) else ("", None)
        if kind not in kinds or not isinstance(text, str):
            expected = f"expected one of {', '.join(kinds)}, with a text"
            raise Malformed("unknown part", f"message {index} has a part of type {kind!r}; {expected}")
        parts.append((kind, text, in_loss and part.get("in_loss", True)))
    return parts
