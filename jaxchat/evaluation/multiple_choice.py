"""Multiple-choice questions for chat and base models: ARC (arXiv:1803.05457) and MMLU (arXiv:2009.03300).

A chat model gets nanochat's prompt; its answer is the most likely letter at the beginning of its turn.
A base model gets lm-evaluation-harness's prompt; its answer is the choice with the highest log-probability: in ARC the
text of the choice, in MMLU its letter, after five examples of the same subject.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxchat.data import sources
from jaxchat.data.conversations import LETTERS, choice_prompt
from jaxchat.errors import UserError
from jaxchat.evaluation.likelihoods import Item
from jaxchat.evaluation.questions import Question
from jaxchat.evaluation.solve import Style
from jaxchat.launcher import log
from jaxchat.paths import user_path
from jaxchat.tasks.files import read_rows
from jaxchat.tasks.limit import take
from jaxchat.tokenizer import Tokenizer, chat

HUB: Mapping[str, tuple[str, str, sources.Split]] = {  # The task of a file, and its data set and split on the hub.
    "arc_easy": ("arc_easy", "arc-easy", "val"),
    "arc_challenge": ("arc_challenge", "arc-challenge", "val"),
    "test": ("mmlu", "mmlu-test", "val"),
    "dev": ("mmlu", "mmlu-test", "train"),
}
SHOTS = 5


class Choice(NamedTuple):
    """A multiple-choice question. `gold` is the index of the right choice; `subject` is empty in ARC."""

    question: str
    choices: tuple[str, ...]
    gold: int
    subject: str = ""


def in_turns(choice: Choice, tokenizer: Tokenizer) -> Question:
    """Builds the question for a chat model.

    Raises:
        UserError: the tokenizer encodes a letter as more than one token.
    """
    letters = LETTERS[: len(choice.choices)]
    ids = chat.asked(choice_prompt(choice.question, choice.choices), tokenizer, in_turns=True)
    answers = [tokenizer.encode(letter) for letter in letters]
    if any(len(answer) != 1 for answer in answers):
        raise UserError("the tokenizer has no single token for some answer letter: evaluate with --style=text")
    return Question(tuple(Item(ids, answer) for answer in answers), choice.gold, "sum")


def arc_in_text(choice: Choice, tokenizer: Tokenizer) -> Question:
    """Builds the question for a base model, which scores the text of each choice."""
    return _in_text(f"Question: {choice.question}\nAnswer:", choice.choices, choice.gold, tokenizer)


def mmlu_in_text(choice: Choice, tokenizer: Tokenizer, examples: Sequence[Choice]) -> Question:
    """Builds the question for a base model, which scores each choice's letter after few-shot `examples`."""
    head = "The following are multiple choice questions (with answers) about "
    head += f"{choice.subject.replace('_', ' ')}.\n\n"
    shots = "".join(f"{_with_letters(one)} {LETTERS[one.gold]}\n\n" for one in examples)
    return _in_text(head + shots + _with_letters(choice), LETTERS[: len(choice.choices)], choice.gold, tokenizer)


def mmlu_questions(
    place: str, downloads: Path, style: Style, tokenizer: Tokenizer, limit: int | None
) -> list[Question]:
    """Builds MMLU's test questions, or `limit` stratified by subject; base models get `SHOTS` dev examples of it."""
    tests = take(read("test", place, downloads), limit, lambda choice: choice.subject)
    if style == "chat":
        return [in_turns(choice, tokenizer) for choice in tests]
    examples: dict[str, list[Choice]] = {}
    for one in read("dev", place, downloads):
        examples.setdefault(one.subject, []).append(one)
    if zero_shot := [choice for choice in tests if choice.subject not in examples]:
        log(
            f"warning: mmlu: {len(zero_shot)} of {len(tests)} questions are asked without examples, because the dev "
            f"file has none for {zero_shot[0].subject or 'their subject'}"
        )
    return [mmlu_in_text(choice, tokenizer, examples.get(choice.subject, [])[:SHOTS]) for choice in tests]


def arc_questions(
    name: str, place: str, downloads: Path, style: Style, tokenizer: Tokenizer, limit: int | None
) -> list[Question]:
    """Builds the questions of arc_easy or arc_challenge, or the first `limit`: their published order is random."""
    make: Callable[[Choice, Tokenizer], Question] = in_turns if style == "chat" else arc_in_text
    return [make(choice, tokenizer) for choice in read(name, place, downloads)[:limit]]


# Tasks by name; their arguments are the place of their files, downloads, style, tokenizer and limit.
QUESTIONS: Mapping[str, Callable[..., list[Question]]] = {
    "arc_easy": partial(arc_questions, "arc_easy"),
    "arc_challenge": partial(arc_questions, "arc_challenge"),
    "mmlu": mmlu_questions,
}


def _with_letters(choice: Choice) -> str:
    lines = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, choice.choices))
    return f"{choice.question.strip()}\n{lines}Answer:"


def _in_text(prompt: str, answers: Sequence[str], gold: int, tokenizer: Tokenizer) -> Question:
    """Builds a question whose items are prompt, space and answer, tokenized as one text."""
    start = [tokenizer.bos, *tokenizer.encode(prompt)]
    items = []
    for answer in answers:
        whole = [tokenizer.bos, *tokenizer.encode(f"{prompt} {answer}")]
        cut = min(len(start), len(whole) - 1)  # lm-evaluation-harness splits at the length of the prompt's own tokens.
        items.append(Item(whole[:cut], whole[cut:]))
    return Question(tuple(items), gold, "sum")


def read(name: str, place: str, downloads: Path) -> list[Choice]:
    """Reads `name`.jsonl[.gz] in the directory or CORE bundle `place`, or from the hub if that is empty. `name` is
    arc_easy, arc_challenge, or test or dev of MMLU.

    Raises:
        UserError: the file is missing or empty, or a row is malformed.
    """
    task, data_set, split = HUB[name]
    in_bundle = user_path(place) / "eval_data" / "world_knowledge"
    directory = str(in_bundle) if place and task != "mmlu" and in_bundle.is_dir() else place
    choices = []
    for where, row in read_rows(task, f"{name}.jsonl", directory, downloads, split, hub=data_set):
        try:
            choice = _choice(row)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{where}: not a question with text choices and the right choice's index") from None
        if not 0 <= choice.gold < len(choice.choices) <= len(LETTERS):
            raise UserError(
                f"{where}: the answer has index {choice.gold} of {len(choice.choices)} choices; "
                f"expected an index from 0 and at most {len(LETTERS)} choices"
            )
        choices.append(choice)
    return choices


def _choice(row: Any) -> Choice:
    """Parses a row of a CORE bundle, of MMLU or of the hub's ARC; a malformed row raises a builtin exception."""
    if "query" in row:
        question, choices, gold = row["query"].removeprefix("Question: "), row["choices"], row["gold"]
    elif "answerKey" in row:
        question, choices = row["question"], row["choices"]["text"]
        gold = list(row["choices"]["label"]).index(row["answerKey"])
    else:
        question, choices, gold = row["question"], row["choices"], row["answer"]
    subject = row.get("subject", "")
    texts = (question, subject, *choices)
    if isinstance(choices, str) or not all(isinstance(text, str) for text in texts) or type(gold) is not int:
        raise TypeError
    return Choice(question, tuple(choices), gold, subject)
