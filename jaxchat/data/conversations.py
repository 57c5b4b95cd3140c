"""Conversations out of files of every usual format, as the messages that tokenizer/chat.py renders.

    {"messages": [{"role": "user", "content": "..."}, ...]}         also ShareGPT's {"conversations": [{"from": ...}]}
    {"prompt": "...", "completion": "..."}                          or "response"; either may be a list of messages
    {"instruction": "...", "input": "...", "output": "..."}         Alpaca; the input may be missing
    {"question": "...", "answer": "..."}                            GSM8K; <<48/2=24>> is a call of the calculator
    {"question": "...", "choices": ["...", ...], "answer": 2}       MMLU, answered with a letter

One a line of .jsonl and .jsonl.gz, a row of .parquet, or an entry of a .json array; also tinyworld:chat[:N] and
hub:smoltalk, hub:gsm8k, hub:mmlu. Words that nobody answers at the end of a conversation are left off. A file of
another format is refused; a single conversation that is none is skipped, with a reason that is counted.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from jaxchat.data.files import Object, Reading, Source, objects, place
from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer, chat
from jaxchat.tokenizer.chat import Malformed, Rendered
from jaxchat.tokenizer.sentencepiece import scalar_values

Message = dict[str, Any]
Form = Literal["chat", "alpaca"]
Skip = Callable[[Any, Malformed, Callable[[], str]], None]
"""Called with what was skipped, why, and a function that says where it stands."""

SUFFIXES: Mapping[str, str] = {".jsonl": "jsonl", ".jsonl.gz": "jsonl.gz", ".parquet": "parquet", ".json": "json"}
TINYWORLD_BYTES = 400  # of a conversation, about
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("observation", "tool", "function", "function_response", "tool_response"), "result"),
}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
)


def conversations(
    source: Source, reading: Reading, form: Form = "chat", *, skip: Skip = lambda *_: None
) -> Iterator[list[Message]]:
    """Every conversation of one part of a source, in a fixed order; `skip` is told of those that are none."""
    for number, row in _tinyworld(source, reading) if source.kind == "tinyworld" else objects(source, reading):
        try:
            yield read(row, form)
        except Malformed as error:
            skip(row, error, partial(place, source, reading, number))
        except UserError as error:
            raise UserError(f"{place(source, reading, number)} {error}") from None


def read(row: Any, form: Form = "chat") -> list[Message]:
    """The messages of a row of any of the formats, with the assistant's last.

    As "alpaca", one user's message, which holds the literal template, and one answer to it.

    Raises:
        Malformed: a conversation that cannot be learned from.
        UserError: a row of none of the formats.
    """
    if not isinstance(row, Mapping):
        raise UserError("is no object; a conversation is one, such as one with a list of messages")
    reader = next((reader for keys, reader in FORMATS if all(key in row for key in keys)), None)
    if reader is None:
        known = "; ".join(" + ".join(keys) for keys, _ in FORMATS)
        raise UserError(f"holds no conversation (its keys are {', '.join(row) or 'none'}): known are {known}")
    messages = reader(row)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise Malformed("no assistant turn", "nobody answers")
    chat.check(messages)
    if form == "chat":
        return messages
    return _as_alpaca(messages, _alpaca_fields(row)[:2] if reader is _read_alpaca else None)


def render(messages: Sequence[Message], tokenizer: Tokenizer, form: Form = "chat") -> Rendered:
    """The tokens of what `read` gives, and which of them are learned."""
    if form == "chat":
        return chat.render(messages, tokenizer)
    prompt, answer = messages
    return chat.render_answer(prompt["content"], answer["content"], tokenizer)


def opening(messages: Sequence[Message]) -> str:
    """What decides whether a conversation is held out: its first words, which all the paths of a tree share."""
    return scalar_values(next(message["content"] for message in messages if message["role"] == "user"))


def words(messages: Sequence[Message]) -> str:
    """Everything that is said, as one text."""
    said = (message["content"] for message in messages)
    texts = (content if isinstance(content, str) else "".join(part["text"] for part in content) for content in said)
    return scalar_values("\n".join(texts))


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's literal template up to where the response begins."""
    return ALPACA[bool(input)].format(instruction=instruction, input=input)


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """nanochat's wording of a question with choices; the answer is a letter."""
    listed = "".join(f"- {choice}={letter}\n" for letter, choice in zip(LETTERS, choices))
    return f"Multiple Choice question: {question}\n{listed}\nRespond only with the letter of the correct answer."


def tinyworld(spec: str, split: str) -> Source:
    """The talk of the tiny world that a spec names, of a split."""
    match = re.fullmatch(r"tinyworld:chat(?::([1-9]\d*))?", spec)
    if not match:
        raise UserError(f"{spec} is not tinyworld:chat, with or without a number of conversations")
    from jaxchat.data.tinyworld import talk

    count = int(match[1] or talk.CONVERSATIONS[split])
    return Source("tinyworld", f"tinyworld:chat-{split}:{count}", count * TINYWORLD_BYTES)


def _tinyworld(source: Source, reading: Reading) -> Iterator[Object]:
    from jaxchat.data.tinyworld import talk

    split, count = source.path.removeprefix("tinyworld:chat-").split(":")
    for i in range(reading.part, int(count), reading.parts):
        yield i + 1, {"messages": talk.conversation(split, i)}
        reading.advance(i, int(count))


def _read_turns(row: Mapping[str, Any]) -> list[Message]:
    """A list of messages, with the system's words and the tools that stand beside it."""
    listed = row["messages"] if "messages" in row else row["conversations"]
    return _system(row) + _fold(listed)


def _read_completion(row: Mapping[str, Any]) -> list[Message]:
    prompt, answer = row["prompt"], row["completion"] if "completion" in row else row["response"]
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return _system(row) + _fold([*before, *after])


def _read_alpaca(row: Mapping[str, Any]) -> list[Message]:
    instruction, context, output = _alpaca_fields(row)
    asked = "\n\n".join(filter(None, (instruction, context)))
    return _system(row) + _pair(asked, output)


def _alpaca_fields(row: Mapping[str, Any]) -> tuple[str, str, Any]:
    """Instruction, input and output; Dolly calls the last two context and response."""
    output = row["output"] if "output" in row else row["response"]
    return _text(row["instruction"]), _text(row.get("input") or row.get("context")), output


def _read_choice(row: Mapping[str, Any]) -> list[Message]:
    question, choices, answer = _text(row["question"]), row["choices"], row["answer"]
    if not question:
        raise Malformed("empty content", "the question holds no text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise Malformed("no such choice", f"there are not 2 to {len(LETTERS)} choices")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, int) and 0 <= answer < len(choices):
        letter = letters[answer]
    elif isinstance(answer, str) and len(answer) == 1 and answer in letters:
        letter = answer
    else:
        raise Malformed("no such choice", f"the answer {answer!r} is none of {len(choices)} choices")
    return _pair(choice_prompt(question, choices), letter)


def _read_answer(row: Mapping[str, Any]) -> list[Message]:
    answer = _text(row["answer"])
    parts = []
    for i, piece in enumerate(_CALL.split(answer)):
        if i % 2:
            call, _, result = piece.rpartition("=") if "=" in piece else (piece, "", "")
            parts += [{"type": "python", "text": call}, {"type": "python_output", "text": result}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return _pair(row["question"], parts if len(parts) > 1 else answer)


_CALL = re.compile("<<([^<>]+)>>")  # GSM8K's marks of what a calculator worked out

FORMATS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], list[Message]]], ...] = (
    (("messages",), _read_turns),
    (("conversations",), _read_turns),
    (("prompt", "completion"), _read_completion),
    (("prompt", "response"), _read_completion),
    (("instruction", "output"), _read_alpaca),
    (("instruction", "response"), _read_alpaca),
    (("question", "choices", "answer"), _read_choice),
    (("question", "answer"), _read_answer),
)


def _pair(asked: Any, answer: Any) -> list[Message]:
    return _fold([{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])


def _system(row: Mapping[str, Any]) -> list[Message]:
    """What a row says besides its messages: the system's words, and descriptions of tools."""
    tools = [row["tools"]] if isinstance(row.get("tools"), str) and row["tools"] else _list(row.get("tools"))
    described = [tool if isinstance(tool, str) else json.dumps(tool, ensure_ascii=False) for tool in tools]
    texts = [_text(row.get("system")), "\n".join(["You can call these tools:", *described]) if described else ""]
    said = "\n\n".join(filter(None, texts))
    return [{"role": "system", "content": said}] if said else []


def _fold(listed: Any) -> list[Message]:
    """Messages in our roles; a tool's call and its result become parts of the assistant's message around them."""
    if not isinstance(listed, list) or not all(isinstance(message, Mapping) for message in listed):
        raise Malformed("no message", "the messages are no list of objects")
    messages: list[Message] = []
    for message in listed:
        given = message.get("role", message.get("from"))
        role = ROLES.get(given.lower(), given) if isinstance(given, str) else str(given)
        content = message.get("content", message.get("value"))
        last: Message = messages[-1] if messages else {"role": ""}
        if role == "system":
            if words := _text(content):
                messages.append({"role": role, "content": words})
        elif role in ("call", "result", "assistant"):
            parts = _assistant_parts(role, content, message)
            follows = last["role"] == "assistant" and (role != "assistant" or _ends(last) == "python_output")
            if role == "result" and not (follows and _ends(last) in ("python", "python_output")):
                raise Malformed("roles out of order", f"message {len(messages)} is a tool's, which nobody called")
            if follows:
                last["content"] = [*last["content"], *parts]
            else:
                messages.append({"role": "assistant", "content": parts})
        else:
            messages.append({"role": role, "content": _text(content)})
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            message["content"] = _simplest(message["content"], i)
    return messages


def _assistant_parts(role: str, content: Any, message: Mapping[str, Any]) -> list[Message]:
    if role != "assistant":
        kind = "python" if role == "call" else "python_output"
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        return [{"type": kind, "text": text}]
    parts = [*content] if isinstance(content, list) else [{"type": "text", "text": _text(content)}]
    for call in _list(message.get("tool_calls")):
        function = call.get("function", call) if isinstance(call, Mapping) else call
        parts.append({"type": "python", "text": json.dumps(function, ensure_ascii=False)})
    return parts


def _ends(message: Message) -> str | None:
    part = message["content"][-1] if message["content"] else None
    return part.get("type") if isinstance(part, Mapping) else None


def _simplest(parts: list[Any], index: int) -> Any:
    """Parts without those that say nothing, or the text where there is but one."""
    said = [
        part
        for part in parts
        if not (isinstance(part, Mapping) and part.get("type") == "text") or part.get("text", True)
    ]
    if said and _ends({"content": said}) == "python":
        raise Malformed("a call without a result", f"message {index} calls a tool that gives no result")
    return said[0]["text"] if len(said) == 1 and _ends({"content": said}) == "text" else said


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(content: Any) -> str:
    """A text; nothing but spaces is none, and parts of text are one."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) and content.strip() else ""


def _as_alpaca(messages: list[Message], fields: tuple[str, str] | None) -> list[Message]:
    """One exchange in Alpaca's literal template; a system message opens the instruction, or the user's words are it."""
    *before, asked, answer = messages
    if len(messages) > 2 and not (len(messages) == 3 and before[0]["role"] == "system"):
        raise Malformed("several turns", f"{len(messages)} messages, where Alpaca's template has one answer")
    instruction, given = fields or (asked["content"], "")
    instruction = "\n\n".join([*(message["content"] for message in before), instruction])
    return [{"role": "user", "content": alpaca_prompt(instruction, given)}, answer]
