"""Messages as data sets write them, made uniform: roles, texts in parts, tool calls and their results, weights."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxchat.tokenizer.chat import Malformed

Message = dict[str, Any]
Note = Callable[[str], object]
"""Called with what is not read as it stands, a phrase that follows "3 conversations"."""
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("observation", "tool", "function", "function_response", "tool_response"), "result"),
}
NOT_READ = ("reasoning_content", "reasoning", "thinking", "audio", "refusal", "train_detail")  # in messages
TEXTS = ("text", "input_text", "output_text")  # types of parts
WEIGHTS = ("weight", "train", "training", "loss")  # keys of a message that say whether it is a training target


def silent(_: str) -> None:
    """A `Note` that nobody reads."""


def normalize(raw_messages: list[Any], note: Note) -> list[Message]:
    """Maps role names; tool calls and results become parts of the assistant message around them."""
    messages: list[Message] = []
    for i, raw in enumerate(message for message in raw_messages if message is not None):
        if not isinstance(raw, Mapping):
            raise Malformed("no message", "the messages are not a list of objects")
        name = first_given(raw, "role", "from")
        role = ROLES.get(name.lower(), name) if isinstance(name, str) else str(name)
        parts = _parts(role, raw, i)
        if not all(part.get("in_loss", True) for part in parts):
            note("with messages of weight 0, which are not trained on")
        if unread := [key for key in NOT_READ if raw.get(key)]:
            note(f"with {' and '.join(unread)}, which is not read")
        last: Message = messages[-1] if messages else {"role": "", "content": []}
        if role == "result" and last["role"] == "assistant":
            _add_result(last["content"], parts, raw, i)
        elif role == "result":
            raise Malformed("roles out of order", f"message {i} is a tool result without a tool call")
        elif last["role"] == "assistant" and (
            role == "call" or (role == "assistant" and _kind(last["content"], -1) == "python_output")
        ):
            last["content"] += parts
        elif parts or role != "system":
            messages.append({"role": "assistant" if role == "call" else role, "content": parts})
    for i, message in enumerate(messages):
        message |= _simplest(message["content"], i, message["role"] == "assistant")
    return messages


def first_given(mapping: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first key that is there and not null."""
    return next((mapping[key] for key in keys if mapping.get(key) is not None), None)


def as_json(value: Any) -> str:
    """A string as it is, and other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def as_text(value: Any) -> str:
    """A field as text: parts are joined, other values written as JSON; "" if it is blank, null or has no entries."""
    text = "" if value is None or value in ([], {}) else as_json(joined := _joined(value))
    if text and joined is not value and not _have_weight(value):
        raise Malformed("unknown weight", "a part of a field has weight 0; write the conversation as messages")
    return text if text.strip() else ""


def as_list(value: Any) -> list[Any]:
    """What a field lists: entries of a list, an object, or either as JSON; a text that is no JSON. Nulls are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            value = [value]
    return [entry for entry in (value if isinstance(value, list) else [value] if value else []) if entry is not None]


def _parts(role: str, message: Mapping[str, Any], index: int) -> list[Message]:
    """The parts of a message, without empty texts."""
    content = first_given(message, "content", "value")
    in_loss = has_weight(message)
    if role in ("call", "result"):
        text = "" if content is None else as_json(_joined(content))
        if _joined(content) is not content:
            in_loss = in_loss and _have_weight(content)
        if role == "call" and not text:
            raise Malformed("empty content", f"message {index} is an empty tool call")
        parts = [{"type": "python" if role == "call" else "python_output", "text": text}]
    else:
        parts = [_as_part(part) for part in (content if isinstance(content, list) else [content])]
        if all(part["type"] == "text" and not part["text"].strip() for part in parts):
            parts = []
        if role == "assistant":
            parts += _calls(message, index)
    weight = {} if in_loss else {"in_loss": False}
    return [part | weight for part in parts if part["type"] != "text" or part["text"] != ""]


def _as_part(part: Any) -> Message:
    """A part of a content, or a value instead of one, as {"type", "text"} and perhaps {"in_loss": False}."""
    if not isinstance(part, Mapping):
        return {"type": "text", "text": "" if part is None else as_json(part)}
    kind, text = str(first_given(part, "type")), part.get("text")
    kind = "text" if kind in TEXTS else kind
    text = "" if text is None and kind == "text" else as_json(text) if isinstance(text, int | float) else text
    if not isinstance(text, str):
        raise Malformed("unknown part", f"a part of type {kind!r} has no text")
    return {"type": kind, "text": text} | ({} if has_weight(part) else {"in_loss": False})


def _calls(message: Mapping[str, Any], index: int) -> Iterator[Message]:
    """The calls of `tool_calls` and of its forerunner `function_call`."""
    for value in (message.get("tool_calls"), message.get("function_call")):
        for call in as_list(value):
            if not isinstance(call, Mapping | str):
                raise Malformed("unknown part", f"message {index} has a tool call that is not an object")
            function = first_given(call, "function") or call if isinstance(call, Mapping) else call
            name = call.get("id") if isinstance(call, Mapping) else None
            yield {"type": "python", "text": as_json(function), "id": name}


def _add_result(parts: list[Message], result: list[Message], message: Mapping[str, Any], index: int) -> None:
    """Inserts a tool's result after the call that it names, or else after the first that has none."""
    waiting = _waiting(parts)
    name = message.get("tool_call_id")
    named = [i for i in waiting if name is not None and parts[i].get("id") == name]
    if not waiting and _kind(parts, -1) != "python_output":
        raise Malformed("roles out of order", f"message {index} is a tool result without a tool call")
    place = next(iter([*named, *waiting]), len(parts) - 1) + 1
    parts[place:place] = result


def _waiting(parts: list[Message]) -> list[int]:
    """Indices of the calls that no result follows."""
    kinds = [_kind(parts, i) for i in range(len(parts))]
    return [i for i, kind in enumerate(kinds) if kind == "python" and kinds[i + 1 : i + 2] != ["python_output"]]


def _kind(parts: list[Message], index: int) -> str | None:
    return parts[index]["type"] if parts else None


def _simplest(parts: list[Message], index: int, is_answer: bool) -> Message:
    """Content and `in_loss` of a message: text parts become a string unless their weights differ."""
    if is_answer and _waiting(parts):
        raise Malformed("a call without a result", f"message {index} has a tool call without a result")
    parts = [{key: value for key, value in part.items() if key != "id"} for part in parts]
    weights = {part.get("in_loss", True) for part in parts}
    no_loss = {"in_loss": False} if False in weights else {}
    if not is_answer and (others := [part["type"] for part in parts if part["type"] != "text"]):
        raise Malformed("unknown part", f"message {index} has a part of type {others[0]!r}; expected text")
    if all(part["type"] == "text" for part in parts) and (len(weights) <= 1 or not is_answer):
        return {"content": "".join(part["text"] for part in parts), **no_loss}
    return {"content": parts}


def has_weight(value: Mapping[str, Any], keys: Sequence[str] = WEIGHTS) -> bool:
    """Whether a row, message or part has no weight 0 or false. Raises `Malformed` for other weights than 0 and 1."""
    given = [(key, value[key]) for key in keys if value.get(key) is not None]
    for key, weight in given:
        if weight not in (0, 1):
            raise Malformed("unknown weight", f"{key} is {weight!r}; expected 0 or 1, true or false")
    return all(weight for _, weight in given)


def _entries(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _have_weight(value: Any) -> bool:
    return all(has_weight(part) for part in _entries(value) if isinstance(part, Mapping))


def _joined(value: Any) -> Any:
    """The text of a text part or of a list that has text parts; other values as they are.

    Raises `Malformed` for other parts in such a list.
    """
    entries = [entry for entry in _entries(value) if entry is not None]
    if not any(isinstance(entry, Mapping) and first_given(entry, "type") in TEXTS for entry in entries):
        return value
    parts = [_as_part(entry) for entry in entries]
    if others := [part["type"] for part in parts if part["type"] != "text"]:
        raise Malformed("unknown part", f"a part of type {others[0]!r} is among texts")
    return "".join(part["text"] for part in parts)
