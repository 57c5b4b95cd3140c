"""Questions whose answer is read off likelihoods: choices after a prompt, contexts before an end, one continuation."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax

from jaxchat.evaluation.likelihoods import Item, Scored, Scorer
from jaxchat.processes import share_out

By = Literal["mean", "sum", "greedy"]

SHARED = 4096  # Questions that processes ask between two exchanges of their answers.


class Question(NamedTuple):
    """Items to score, and how the answer is read off them.

    "mean" takes the item with the highest mean log-probability of a token, "sum" that with the highest sum; "greedy"
    has one item, right where every token of it is the most likely one. `gold` is the right item's number.
    """

    items: tuple[Item, ...]
    gold: int
    by: By


class Answer(NamedTuple):
    """Whether a question was answered right, with which item, and how its items were scored.

    Attributes:
        predicted: number of the chosen item; for a single continuation 0 where it is right and -1 where not.
        scores: mean or sum of each item's log-probabilities, in nats.
        truncated: tokens of the question's longest item that did not fit and were not read.
    """

    right: bool
    predicted: int
    scores: tuple[float, ...]
    truncated: int


def fit(question: Question, length: int) -> tuple[Question, int]:
    """The question as a model reads it, and how many tokens it does not: as many are cut from the beginning of every
    item as its longest has more than `length` + 1, so that all choices follow the same text.

    Where that would leave an item no context, its last token stays, and what is still too long is the scorer's to cut.
    """
    over = max(len(item.context) + len(item.continuation) for item in question.items) - length - 1
    if over <= 0:
        return question, 0
    cut = tuple(Item(item.context[min(over, len(item.context) - 1) :], item.continuation) for item in question.items)
    return question._replace(items=cut), over


def answer(question: Question, scored: Sequence[Scored], truncated: int = 0) -> Answer:
    """Reads the answer off the scores of a question's items; of equal scores the first counts."""
    reduce = {"mean": "mean", "sum": "sum", "greedy": "sum"}[question.by]
    scores = tuple(float(getattr(one.logprobs.astype("float64"), reduce)()) for one in scored)
    if question.by == "greedy":
        return Answer(scored[0].greedy, 0 if scored[0].greedy else -1, scores, truncated)
    predicted = scores.index(max(scores))
    return Answer(predicted == question.gold, predicted, scores, truncated)


def ask(scorer: Scorer, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
    """Each question's number and answer, as they become known; items of all questions share batches."""
    fitted = [fit(question, scorer.length) for question in questions]
    owners = [(number, place) for number, (question, _) in enumerate(fitted) for place in range(len(question.items))]
    found: dict[int, dict[int, Scored]] = {}
    for index, scored in scorer.stream([item for question, _ in fitted for item in question.items]):
        number, place = owners[index]
        mine = found.setdefault(number, {})
        mine[place] = scored
        question, truncated = fitted[number]
        if len(mine) == len(question.items):
            del found[number]
            yield number, answer(question, [mine[i] for i in range(len(mine))], truncated)


def ask_together(scorer: Scorer, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
    """`ask`, every process of the run asking a part of them; each is told all the answers."""
    if jax.process_count() == 1:
        yield from ask(scorer, questions)
        return
    for start in range(0, len(questions), SHARED):
        part = questions[start : start + SHARED]
        yield from enumerate(share_out(part, lambda own: [one for _, one in sorted(ask(scorer, own))]), start)


def choices(texts: Sequence[Sequence[int]], gold: int, by: By = "mean") -> Question:
    """Whole texts that differ in their ends: what they have in common is the context, but a token is left of each.

    Raises:
        ValueError: a text is shorter than two tokens.
    """
    start = min(common(texts), min(map(len, texts)) - 1)
    if start < 1:
        raise ValueError("its choices have no text in common")
    return Question(tuple(Item(text[:start], text[start:]) for text in texts), gold, by)


def schema(texts: Sequence[Sequence[int]], gold: int) -> Question:
    """Whole texts that differ in their beginnings: what they have in common at the end is scored.

    Raises:
        ValueError: they have no common end.
    """
    end = min(common([text[::-1] for text in texts]), min(map(len, texts)) - 1)
    if end < 1:
        raise ValueError("its contexts are followed by nothing in common")
    return Question(tuple(Item(text[:-end], text[-end:]) for text in texts), gold, "mean")


def common(texts: Iterable[Sequence[int]]) -> int:
    """How many first tokens all texts share."""
    count = 0
    for tokens in zip(*texts):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count
