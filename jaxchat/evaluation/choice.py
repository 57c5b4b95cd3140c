"""Questions with choices for chat models and base models: ARC (arXiv:1803.05457) and MMLU (arXiv:2009.03300).

A chat model is asked as nanochat asks it, and the letter with the highest probability right after `<|assistant_start|>`
is its answer. A base model is asked as lm-evaluation-harness asks it: for ARC the answer's text with the highest
log-probability, for MMLU the letter, after five examples of the same subject.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxchat.data import sources
from jaxchat.data.files import Reading, objects
from jaxchat.data.files import place as stands
from jaxchat.errors import UserError
from jaxchat.evaluation.likelihoods import Item
from jaxchat.evaluation.questions import Question
from jaxchat.evaluation.solve import Style
from jaxchat.launcher import log
from jaxchat.tokenizer import Tokenizer, chat

HUB: Mapping[str, tuple[str, sources.Split]] = {
    "arc_easy": ("hub:arc-easy", "val"),
    "arc_challenge": ("hub:arc-challenge", "val"),
    "test": ("hub:mmlu-test", "val"),
    "dev": ("hub:mmlu-test", "train"),
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHOTS = 5


class Choice(NamedTuple):
    """A question, its choices, the right one's number, and its subject."""

    question: str
    choices: tuple[str, ...]
    gold: int
    subject: str = ""


def arc(place: str, name: str, downloads: Path) -> list[Choice]:
    """The questions of arc_easy or arc_challenge: NAME.jsonl[.gz] in a directory or a CORE bundle, else the hub's.

    Raises:
        UserError: there is no such file, or a row is no question.
    """
    return list(_read(name, (place, f"{place}/eval_data/world_knowledge") if place else (), downloads))


def mmlu(place: str, split: str, downloads: Path) -> list[Choice]:
    """The questions of MMLU, test or dev: SPLIT.jsonl[.gz] in a directory, else the hub's.

    Raises:
        UserError: there is no such file, or a row is no question.
    """
    return list(_read(split, (place,) if place else (), downloads))


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


def mmlu_questions(
    place: str, downloads: Path, style: Style, tokenizer: Tokenizer, limit: int | None
) -> list[Question]:
    """MMLU's test questions, the first `limit` of them."""
    asked = mmlu(place, "test", downloads)[:limit]
    if style == "chat":
        return [in_turns(choice, tokenizer) for choice in asked]
    shown: dict[str, list[Choice]] = {}
    for one in mmlu(place, "dev", downloads):
        shown.setdefault(one.subject, []).append(one)
    if bare := [choice for choice in asked if choice.subject not in shown]:
        log(
            f"warning: mmlu: {len(bare)} of {len(asked)} questions are asked without examples, for the dev file has "
            f"none of {bare[0].subject or 'their subject'}"
        )
    return [mmlu_in_text(choice, tokenizer, shown.get(choice.subject, [])[:SHOTS]) for choice in asked]


def arc_questions(
    name: str, place: str, downloads: Path, style: Style, tokenizer: Tokenizer, limit: int | None
) -> list[Question]:
    """The questions of arc_easy or arc_challenge, the first `limit` of them."""
    make: Callable[[Choice, Tokenizer], Question] = in_turns if style == "chat" else arc_in_text
    return [make(choice, tokenizer) for choice in arc(place, name, downloads)[:limit]]


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


def _read(name: str, places: Sequence[str], downloads: Path) -> Iterator[Choice]:
    """The rows of a file in the first of some directories that has it; of the hub's, where no directory is named."""
    names = [Path(place) / f"{name}{suffix}" for place in places for suffix in (".jsonl", ".jsonl.gz")]
    if places and not any(path.is_file() for path in names):
        raise UserError(f"no {name}.jsonl or {name}.jsonl.gz in {places[0]}: name the directory that has it")
    data_set, split = HUB[name]
    spec = str(next(path for path in names if path.is_file())) if places else data_set
    reading, found = Reading(), 0
    for source in sources.find(spec, split, hub_directory=downloads):
        for number, row in objects(source, reading):
            found += 1
            try:
                choice = _choice(row)
            except (AttributeError, KeyError, TypeError, ValueError):
                where = stands(source, reading, number)
                raise UserError(f"{where} is no question with choices, all of them text, and the right one's") from None
            if not 0 <= choice.gold < len(choice.choices) <= len(LETTERS):
                raise UserError(
                    f"{stands(source, reading, number)}: its answer is number {choice.gold} of "
                    f"{len(choice.choices)} choices, counted from 0"
                )
            yield choice
    if not found:
        raise UserError(f"{spec} has no questions: fetch it again")


def _choice(row: Any) -> Choice:
    """A row of a CORE bundle, of MMLU, or of the hub's ARC; another raises one of Python's own errors."""
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
