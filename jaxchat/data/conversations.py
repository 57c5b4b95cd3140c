"""Reads conversations in all common layouts, as the messages that tokenizer/chat.py renders.

    {"messages": [{"role": "user", "content": "..."}, ...]}         also ShareGPT's {"conversations": [{"from": ...}]}
    {"prompt": "...", "completion": "..."}                          or "response"; either may be a list of messages
    {"instruction": "...", "input": "...", "output": "..."}         Alpaca; "input" is optional
    {"question": "...", "answer": "..."}                            GSM8K; <<48/2=24>> is a calculator call
    {"question": "...", "choices": ["...", ...], "answer": 2}       MMLU; the answer becomes a letter

One per line of .jsonl and .jsonl.gz, per row of .parquet, or per entry of a .json array; also tinyworld:chat[:N],
hub:smoltalk, hub:gsm8k and hub:mmlu. Messages after the last answer are dropped. A row of an unknown layout raises
`UserError`; a malformed conversation is skipped and counted under its reason. A new layout is a function and a row of
`LAYOUTS`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxchat.errors import UserError
from jaxchat.tokenizer import chat
from jaxchat.tokenizer.chat import Malformed
from jaxchat.tokenizer.sentencepiece import scalar_values

Message = dict[str, Any]
Reader = Callable[[Mapping[str, Any]], list[Message]]
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


def read(row: Any) -> list[Message]:
    """Converts a row of any of the layouts to messages, of which the last is the assistant's.

    Raises:
        Malformed: the conversation cannot be trained on.
        UserError: the layout of the row is unknown.
    """
    if not isinstance(row, Mapping):
        raise UserError('is not an object; write each conversation as an object, such as {"messages": [...]}')
    reader = _reader(row)
    if reader is None:
        known = ", ".join(" + ".join(keys) for keys, _ in LAYOUTS)
        raise UserError(f"holds no conversation (its keys are {', '.join(row) or 'none'}); expected one of: {known}")
    messages = reader(row)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise Malformed("no assistant turn", "there is no message of the assistant")
    chat.check(messages)
    return messages


def instruction(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Instruction and input of a row of the Alpaca layout; None for another layout."""
    return _alpaca_fields(row)[:2] if _reader(row) is _read_alpaca else None


def opening(messages: Sequence[Message]) -> str:
    """The first user message, which decides the split: all branches of a conversation tree share it."""
    return scalar_values(next(message["content"] for message in messages if message["role"] == "user"))


def words(messages: Sequence[Message]) -> str:
    """The text of all messages, joined by newlines."""
    contents = (message["content"] for message in messages)
    texts = (text if isinstance(text, str) else "".join(part["text"] for part in text) for text in contents)
    return scalar_values("\n".join(texts))


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The Alpaca template, filled in up to the beginning of the response."""
    return ALPACA[bool(input)].format(instruction=instruction, input=input)


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """A multiple-choice question in nanochat's wording; the answer is a letter."""
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(LETTERS, choices))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def _read_turns(row: Mapping[str, Any]) -> list[Message]:
    return _system(row) + _normalize(row["messages"] if "messages" in row else row["conversations"])


def _read_completion(row: Mapping[str, Any]) -> list[Message]:
    prompt, answer = row["prompt"], row["completion"] if "completion" in row else row["response"]
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return _system(row) + _normalize([*before, *after])


def _read_alpaca(row: Mapping[str, Any]) -> list[Message]:
    instruction, context, output = _alpaca_fields(row)
    return _system(row) + _pair("\n\n".join(filter(None, (instruction, context))), output)


def _alpaca_fields(row: Mapping[str, Any]) -> tuple[str, str, Any]:
    """Instruction, input and output; the Dolly data set names the last two context and response."""
    output = row["output"] if "output" in row else row["response"]
    return _text(row["instruction"]), _text(row.get("input") or row.get("context")), output


def _read_choice(row: Mapping[str, Any]) -> list[Message]:
    question, choices, answer = _text(row["question"]), row["choices"], row["answer"]
    if not question:
        raise Malformed("empty content", "the question has no text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise Malformed("no such choice", f"choices is not a list of 2 to {len(LETTERS)} entries")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, int) and 0 <= answer < len(choices):
        letter = letters[answer]
    elif isinstance(answer, str) and len(answer) == 1 and answer in letters:
        letter = answer
    else:
        raise Malformed("no such choice", f"the answer {answer!r} is not one of the {len(choices)} choices")
    return _pair(choice_prompt(question, choices), letter)


def _read_answer(row: Mapping[str, Any]) -> list[Message]:
    answer = _text(row["answer"])
    parts = []
    for i, text in enumerate(_CALL.split(answer)):
        if i % 2:
            call, _, result = text.rpartition("=") if "=" in text else (text, "", "")
            parts += [{"type": "python", "text": call}, {"type": "python_output", "text": result}]
        elif text:
            parts.append({"type": "text", "text": text})
    return _pair(row["question"], parts if len(parts) > 1 else answer)


_CALL = re.compile("<<([^<>]+)>>")  # a calculator annotation of GSM8K

LAYOUTS: tuple[tuple[tuple[str, ...], Reader], ...] = (
    (("messages",), _read_turns),
    (("conversations",), _read_turns),
    (("prompt", "completion"), _read_completion),
    (("prompt", "response"), _read_completion),
    (("instruction", "output"), _read_alpaca),
    (("instruction", "response"), _read_alpaca),
    (("question", "choices", "answer"), _read_choice),
    (("question", "answer"), _read_answer),
)


def _reader(row: Mapping[str, Any]) -> Reader | None:
    """The reader of the first layout whose keys the row has."""
    return next((reader for keys, reader in LAYOUTS if all(key in row for key in keys)), None)


def _pair(question: Any, answer: Any) -> list[Message]:
    return _normalize([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _system(row: Mapping[str, Any]) -> list[Message]:
    """A system message of the row's system prompt and tool descriptions, if it has any."""
    tools = [row["tools"]] if isinstance(row.get("tools"), str) and row["tools"] else _list(row.get("tools"))
    described = [tool if isinstance(tool, str) else json.dumps(tool, ensure_ascii=False) for tool in tools]
    texts = [_text(row.get("system")), "\n".join(["You can call these tools:", *described]) if described else ""]
    content = "\n\n".join(filter(None, texts))
    return [{"role": "system", "content": content}] if content else []


def _normalize(raw_messages: Any) -> list[Message]:
    """Maps role names; tool calls and results become parts of the assistant message around them."""
    if not isinstance(raw_messages, list) or not all(isinstance(message, Mapping) for message in raw_messages):
        raise Malformed("no message", "the messages are not a list of objects")
    messages: list[Message] = []
    for message in raw_messages:
        name = message.get("role", message.get("from"))
        role = ROLES.get(name.lower(), name) if isinstance(name, str) else str(name)
        content = message.get("content", message.get("value"))
        last: Message = messages[-1] if messages else {"role": ""}
        if role == "system":
            if text := _text(content):
                messages.append({"role": role, "content": text})
        elif role in ("call", "result", "assistant"):
            parts = _assistant_parts(role, content, message)
            continues = last["role"] == "assistant" and (role != "assistant" or _last_kind(last) == "python_output")
            if role == "result" and not (continues and _last_kind(last) in ("python", "python_output")):
                raise Malformed("roles out of order", f"message {len(messages)} is a tool result without a tool call")
            if continues:
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


def _last_kind(message: Message) -> str | None:
    part = message["content"][-1] if message["content"] else None
    return part.get("type") if isinstance(part, Mapping) else None


def _simplest(parts: list[Any], index: int) -> Any:
    """The parts without empty texts; a single text part becomes a string."""
    nonempty = [
        part
        for part in parts
        if not (isinstance(part, Mapping) and part.get("type") == "text") or part.get("text", True)
    ]
    kind = _last_kind({"content": nonempty})
    if kind == "python":
        raise Malformed("a call without a result", f"message {index} ends with a tool call without a result")
    return nonempty[0]["text"] if len(nonempty) == 1 and kind == "text" else nonempty


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(content: Any) -> str:
    """Content that is a string or a list of text parts, as a string; "" if it is blank or something else."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    return content if isinstance(content, str) and content.strip() else ""
