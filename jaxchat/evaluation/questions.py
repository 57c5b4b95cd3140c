"""Questions answered by likelihood: choices after a prompt, contexts before a common ending, or one continuation."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax

from jaxchat.decode.prompts import common
from jaxchat.evaluation.likelihoods import Item, Scored, Scorer
from jaxchat.processes import share_out

By = Literal["mean", "sum", "greedy"]

SHARED = 4096  # Number of questions after which processes exchange their answers.


class Question(NamedTuple):
    """Items to score, and the rule that chooses the answer.

    "mean" chooses the item with the highest mean log-probability per token, "sum" the one with the highest sum.
    "greedy" has one item, right if each of its tokens is the most likely one. `gold` is the index of the right item.
    """

    items: tuple[Item, ...]
    gold: int
    by: By


class Answer(NamedTuple):
    """The model's answer to a question.

    Attributes:
        predicted: index of the chosen item; for "greedy" 0 if the continuation is right, else -1.
        scores: mean or sum of each item's log-probabilities, in nats.
        truncated: number of tokens cut from each item.
    """

    right: bool
    predicted: int
    scores: tuple[float, ...]
    truncated: int


def fit(question: Question, length: int) -> tuple[Question, int]:
    """Truncates a question to a context of `length` tokens; returns it and the number of tokens cut.

    Every item loses as many tokens from the left as the longest item exceeds `length` + 1, so that all choices follow
    the same text. The last context token always stays; the scorer truncates an item that is still too long.
    """
    over = max(len(item.context) + len(item.continuation) for item in question.items) - length - 1
    if over <= 0:
        return question, 0
    cut = tuple(Item(item.context[min(over, len(item.context) - 1) :], item.continuation) for item in question.items)
    return question._replace(items=cut), over


def answer(question: Question, scored: Sequence[Scored], truncated: int = 0) -> Answer:
    """Chooses the answer from the scores of a question's items; the first of equal scores wins."""
    reduce = {"mean": "mean", "sum": "sum", "greedy": "sum"}[question.by]
    scores = tuple(float(getattr(one.logprobs.astype("float64"), reduce)()) for one in scored)
    if question.by == "greedy":
        return Answer(scored[0].greedy, 0 if scored[0].greedy else -1, scores, truncated)
    predicted = scores.index(max(scores))
    return Answer(predicted == question.gold, predicted, scores, truncated)


def ask(scorer: Scorer, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
    """Yields the number and answer of each question as soon as they are computed; all questions share batches."""
    fitted = [fit(question, scorer.length) for question in questions]
    owners = [(number, place) for number, (question, _) in enumerate(fitted) for place in range(len(question.items))]
    pending: dict[int, dict[int, Scored]] = {}
    for index, scored in scorer.stream([item for question, _ in fitted for item in question.items]):
        number, place = owners[index]
        by_place = pending.setdefault(number, {})
        by_place[place] = scored
        question, truncated = fitted[number]
        if len(by_place) == len(question.items):
            del pending[number]
            yield number, answer(question, [by_place[i] for i in range(len(by_place))], truncated)


def ask_together(scorer: Scorer, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
    """Like `ask`, with the questions divided among processes; every process yields all answers."""
    if jax.process_count() == 1:
        yield from ask(scorer, questions)
        return
    for start in range(0, len(questions), SHARED):
        part = questions[start : start + SHARED]
        yield from enumerate(share_out(part, lambda own: [one for _, one in sorted(ask(scorer, own))]), start)


def choices(texts: Sequence[Sequence[int]], gold: int) -> Question:
    """Builds a question from tokenized texts that share a beginning, which becomes the context.

    At least one token of each text is scored.

    Raises:
        ValueError: the texts have no common beginning, or one of them has fewer than two tokens.
    """
    start = min(min(common(texts[0], text), len(text) - 1) for text in texts)
    if start < 1:
        raise ValueError("its choices have no text in common")
    return Question(tuple(Item(text[:start], text[start:]) for text in texts), gold, "mean")


def schema(texts: Sequence[Sequence[int]], gold: int) -> Question:
    """Builds a question from tokenized texts that share an ending, which is scored after each beginning.

    Raises:
        ValueError: the texts have no common ending, or one of them has fewer than two tokens.
    """
    end = min(min(common(texts[0][::-1], text[::-1]), len(text) - 1) for text in texts)
    if end < 1:
        raise ValueError("its contexts have no ending in common")
    return Question(tuple(Item(text[:-end], text[-end:]) for text in texts), gold, "mean")
