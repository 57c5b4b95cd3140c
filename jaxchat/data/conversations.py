"""Reads conversations in all common layouts, as the messages that tokenizer/chat.py renders.

    {"messages": [{"role": "user", "content": "..."}, ...]}         also ShareGPT's {"conversations": [{"from": ...}]}
    {"prompt": "...", "completion": "..."}                          or "response"; either may be a list of messages
    {"instruction": "...", "input": "...", "output": "..."}         Alpaca; "input" is optional
    {"question": "...", "answer": "..."}                            GSM8K; <<48/2=24>> is a calculator call
    {"question": "...", "choices": ["...", ...], "answer": 2}       MMLU; the answer becomes a letter

One per line of .jsonl and .jsonl.gz, per row of .parquet, or per entry of a .json array; also tinyworld:chat[:N],
hub:smoltalk, hub:gsm8k and hub:mmlu. docs/fine_tuning.md has a table of what is read how. A key whose value is
null counts as missing. A row of an unknown layout raises `UserError`; a malformed conversation is skipped and counted
under its reason; what is left out of a conversation is noted. A new layout is a function and a row of `LAYOUTS`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxchat.data.messages import WEIGHTS, Message, Note, as_list, as_text, first_given, has_weight, normalize, silent
from jaxchat.errors import UserError
from jaxchat.tokenizer import chat
from jaxchat.tokenizer.chat import Malformed
from jaxchat.tokenizer.sentencepiece import scalar_values

Reader = Callable[[Mapping[str, Any]], list[Any]]
"""Returns the messages of a row as they are written there; None and empty fields included."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
)


def read(row: Any, note: Note = silent) -> list[Message]:
    """Converts a row of any of the layouts to messages, of which the last is the assistant's.

    A message or part of weight 0 gets {"in_loss": False}, see `chat.render`.

    Raises:
        Malformed: the conversation cannot be trained on.
        UserError: the layout of the row is unknown.
    """
    if row is None:
        raise Malformed("no message", "the row is null")
    if not isinstance(row, Mapping):
        raise UserError('is not an object; write each conversation as an object, such as {"messages": [...]}')
    reader = _reader(row)
    if reader is None:
        known = ", ".join(" + ".join(keys) for keys, _ in LAYOUTS)
        raise UserError(f"holds no conversation (its keys are {', '.join(row) or 'none'}); expected one of: {known}")
    if not has_weight(row, WEIGHTS[:2]):
        raise Malformed("nothing to train on", "the conversation has weight 0")
    messages = _trimmed(opened(row, normalize(reader(row), note), note), note)
    turns = chat.check(messages)
    if not any(
        in_loss and kind != "python_output" for role, parts in turns if role != "user" for kind, _, in_loss in parts
    ):
        raise Malformed("nothing to train on", "no message of the assistant has a weight other than 0")
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


def _read_turns(row: Mapping[str, Any]) -> list[Any]:
    messages = first_given(row, "messages", "conversations")
    messages = as_list(messages) if isinstance(messages, str) else messages
    if not isinstance(messages, list):
        raise Malformed("no message", "the messages are not a list of objects")
    return messages


def _read_completion(row: Mapping[str, Any]) -> list[Any]:
    prompt, answer = row["prompt"], first_given(row, "completion", "response")
    return [*_history(row), *_turns(prompt, "user"), *_turns(answer, "assistant")]


def _turns(value: Any, role: str) -> list[Any]:
    """A message or a list of messages as they are; another value as a message of this role."""
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        return [value]
    return value if isinstance(value, list) else [{"role": role, "content": as_text(value)}]


def _read_alpaca(row: Mapping[str, Any]) -> list[Any]:
    instruction, context, output = _alpaca_fields(row)
    return [*_history(row), *_pair("\n\n".join(filter(None, (instruction, context))), output)]


def _alpaca_fields(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Instruction, input and output; the Dolly data set names the last two context and response."""
    context = as_text(row.get("input")) or as_text(row.get("context"))
    return as_text(row["instruction"]), context, as_text(first_given(row, "output", "response"))


def _history(row: Mapping[str, Any]) -> Iterator[Any]:
    """The turns before a question: pairs of question and answer, or messages."""
    for turn in as_list(row.get("history")):
        if isinstance(turn, list | tuple) and len(turn) == 2:
            yield from _pair(*map(as_text, turn))
        elif isinstance(turn, Mapping):
            yield turn
        else:
            raise Malformed("unknown history", "history is not a list of pairs of a question and its answer")


def _read_choice(row: Mapping[str, Any]) -> list[Message]:
    question, choices, answer = as_text(row["question"]), row["choices"], row["answer"]
    if not question:
        raise Malformed("empty content", "the question has no text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise Malformed("no such choice", f"choices is not a list of 2 to {len(LETTERS)} entries")
    choices = [as_text(choice) for choice in choices]
    if not all(choices):
        raise Malformed("empty content", f"choice {choices.index('')} has no text")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, int) and 0 <= answer < len(choices):
        letter = letters[answer]
    elif isinstance(answer, str) and len(answer) == 1 and answer in letters:
        letter = answer
    else:
        raise Malformed("no such choice", f"the answer {answer!r} is not one of the {len(choices)} choices")
    return _pair(choice_prompt(question, choices), letter)


def _read_answer(row: Mapping[str, Any]) -> list[Message]:
    answer = as_text(row["answer"])
    parts = []
    for i, text in enumerate(_CALL.split(answer)):
        if i % 2:
            call, _, result = text.rpartition("=") if "=" in text else (text, "", "")
            parts += [{"type": "python", "text": call}, {"type": "python_output", "text": result}]
        elif text:
            parts.append({"type": "text", "text": text})
    return [*_history(row), *_pair(as_text(row["question"]), parts if len(parts) > 1 else answer)]


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


COLUMNS = [
    *dict.fromkeys(key for keys, _ in LAYOUTS for key in keys),
    *("input", "context", "history", "system", "system_prompt", "tools", "functions", *WEIGHTS[:2]),
]
"""All keys of a row that are read."""


def _reader(row: Mapping[str, Any]) -> Reader | None:
    """The reader of the first layout whose keys the row has, not null if possible."""
    fitting = [(keys, reader) for keys, reader in LAYOUTS if all(key in row for key in keys)]
    given = [reader for keys, reader in fitting if all(row[key] is not None for key in keys)]
    return next(iter([*given, *(reader for _, reader in fitting)]), None)


def _pair(question: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def opened(row: Mapping[str, Any], messages: list[Message], note: Note) -> list[Message]:
    """Messages from the first user message on, after one system message that joins all earlier system messages."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    if any(message["role"] == "assistant" for message in messages[:first]):
        note("whose greeting before the first user message is left out")
    before = [message for message in messages[:first] if message["role"] == "system"]
    described = [*filter(None, map(as_text, as_list(first_given(row, "tools", "functions"))))]
    texts = [
        as_text(first_given(row, "system", "system_prompt")),
        *(message["content"] for message in before),
        "\n".join(["You can call these tools:", *described]) if described else "",
    ]
    content = "\n\n".join(filter(None, texts))
    weights = {key: value for message in before for key, value in message.items() if key == "in_loss"}
    system = [{"role": "system", "content": content, **weights}] if content else []
    unknown = [message for message in messages[:first] if message["role"] not in ("system", "assistant")]
    return [*system, *unknown, *messages[first:]]


def _trimmed(messages: list[Message], note: Note) -> list[Message]:
    """Messages up to the last answer that has content."""
    last = len(messages)
    while last and not (messages[last - 1]["role"] == "assistant" and messages[last - 1]["content"]):
        last -= 1
    if not last:
        if any(message["role"] == "assistant" for message in messages):
            raise Malformed("empty content", "no message of the assistant has text")
        raise Malformed("no assistant turn", "there is no message of the assistant")
    if last < len(messages):
        note("whose messages after the last answer are left out")
    return messages[:last]
