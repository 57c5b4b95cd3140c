"""Questions with choices for chat models and base models: ARC (arXiv:1803.05457) and MMLU (arXiv:2009.03300).

A chat model is asked as nanochat asks it, and the letter with the highest probability right after `<|assistant_start|>`
is its answer. A base model is asked as lm-evaluation-harness asks it: for ARC the answer's text with the highest
log-probability, for MMLU the letter, after five examples of the same subject.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxchat.config import UserError
from jaxchat.data.files import Reading, Source, objects, place
from jaxchat.evaluation.likelihoods import Item
from jaxchat.evaluation.questions import Question
from jaxchat.evaluation.solve import Style
from jaxchat.tokenizer import Tokenizer, chat

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHOTS = 5


class Choice(NamedTuple):
    """A question, its choices, the right one's number, and its subject."""

    question: str
    choices: tuple[str, ...]
    gold: int
    subject: str = ""


def arc(directory: Path, name: str) -> list[Choice]:
    """The rows of arc_easy.jsonl or arc_challenge.jsonl, in a directory or in a CORE bundle: query, choices, gold.

    Raises:
        UserError: there is no such file, or a row is not of that kind.
    """
    places = (directory, directory / "eval_data" / "world_knowledge")
    return [
        Choice(row["query"].removeprefix("Question: "), tuple(row["choices"]), row["gold"])
        for row in _rows(places, name, {"query": str, "choices": list, "gold": int}, "gold")
    ]


def mmlu(directory: Path, split: str) -> list[Choice]:
    """The rows of test.jsonl or dev.jsonl: question, choices, answer (a number), subject.

    Raises:
        UserError: there is no such file, or a row is not of that kind.
    """
    fields = {"question": str, "choices": list, "answer": int, "subject": str}
    return [
        Choice(row["question"], tuple(row["choices"]), row["answer"], row["subject"])
        for row in _rows((directory,), split, fields, "answer")
    ]


def in_turns(choice: Choice, tokenizer: Tokenizer) -> Question:
    """The question for a chat model.

    Raises:
        UserError: the tokenizer cannot say a letter with one token, or knows no turns.
    """
    letters = LETTERS[: len(choice.choices)]
    listed = "".join(f"- {text}={letter}\n" for letter, text in zip(letters, choice.choices))
    asked = (
        f"Multiple Choice question: {choice.question}\n{listed}\nRespond only with the letter of the correct answer."
    )
    ids = chat.render([{"role": "user", "content": asked}], tokenizer, complete=True).ids
    answers = [tokenizer.encode(letter) for letter in letters]
    if any(len(answer) != 1 for answer in answers):
        raise UserError("the tokenizer has no token for a letter alone: ask this model as --style=text")
    return Question(tuple(Item(ids, answer) for answer in answers), choice.gold, "sum")


def arc_in_text(choice: Choice, tokenizer: Tokenizer) -> Question:
    """The question for a base model: which answer's text follows."""
    return _in_text(f"Question: {choice.question}\nAnswer:", choice.choices, choice.gold, tokenizer)


def mmlu_in_text(choice: Choice, tokenizer: Tokenizer, examples: Sequence[Choice]) -> Question:
    """The question for a base model: which letter follows, after solved examples of the same subject."""
    head = "The following are multiple choice questions (with answers) about "
    head += f"{choice.subject.replace('_', ' ')}.\n\n"
    shown = "".join(f"{_listed(one)} {LETTERS[one.gold]}\n\n" for one in examples)
    return _in_text(head + shown + _listed(choice), LETTERS[: len(choice.choices)], choice.gold, tokenizer)


def mmlu_questions(directory: Path, style: Style, tokenizer: Tokenizer, limit: int | None) -> list[Question]:
    """MMLU's test questions, the first `limit` of them."""
    asked = mmlu(directory, "test")[:limit]
    if style == "chat":
        return [in_turns(choice, tokenizer) for choice in asked]
    shown: dict[str, list[Choice]] = {}
    for one in mmlu(directory, "dev"):
        shown.setdefault(one.subject, []).append(one)
    return [mmlu_in_text(choice, tokenizer, shown.get(choice.subject, [])[:SHOTS]) for choice in asked]


def arc_questions(name: str, directory: Path, style: Style, tokenizer: Tokenizer, limit: int | None) -> list[Question]:
    """The questions of arc_easy or arc_challenge, the first `limit` of them."""
    make: Callable[[Choice, Tokenizer], Question] = in_turns if style == "chat" else arc_in_text
    return [make(choice, tokenizer) for choice in arc(directory, name)[:limit]]


def _listed(choice: Choice) -> str:
    lines = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, choice.choices))
    return f"{choice.question.strip()}\n{lines}Answer:"


def _in_text(prompt: str, answers: Sequence[str], gold: int, tokenizer: Tokenizer) -> Question:
    """Each answer after a space, tokenized with the prompt before it."""
    start = [tokenizer.bos, *tokenizer.encode(prompt)]
    items = []
    for answer in answers:
        whole = [tokenizer.bos, *tokenizer.encode(f"{prompt} {answer}")]
        cut = min(len(start), len(whole) - 1)  # lm-evaluation-harness cuts where the prompt alone would end.
        items.append(Item(whole[:cut], whole[cut:]))
    return Question(tuple(items), gold, "sum")


def _rows(directories: Sequence[Path], name: str, fields: Mapping[str, type], gold: str) -> Iterator[dict[str, Any]]:
    path = next((p for d in directories for p in (d / f"{name}.jsonl", d / f"{name}.jsonl.gz") if p.is_file()), None)
    if path is None:
        raise UserError(f"no {name}.jsonl or {name}.jsonl.gz in {directories[0]}: name the directory that has it")
    source = Source("jsonl.gz" if path.suffix == ".gz" else "jsonl", str(path), path.stat().st_size)
    reading = Reading()
    for number, row in objects(source, reading):
        right = isinstance(row, dict) and all(isinstance(row.get(field), kind) for field, kind in fields.items())
        if not right or not all(isinstance(text, str) for text in row["choices"]):
            raise UserError(f"{place(source, reading, number)} is no row with {', '.join(fields)}")
        if not 0 <= row[gold] < len(row["choices"]) <= len(LETTERS):
            raise UserError(f"{place(source, reading, number)}: {gold}={row[gold]} names none of its choices")
        yield row
