"""The mixture of stories, portraits, questions and exercises, document by document."""

import random
from collections.abc import Iterator
from functools import cache

from jaxchat.data.tinyworld import plots_days, plots_things, world
from jaxchat.data.tinyworld.chance import between, pick, sample, seeded, stable_hash
from jaxchat.data.tinyworld.english import HE, SHE
from jaxchat.data.tinyworld.facts import Fact, facts, facts_by_subject
from jaxchat.data.tinyworld.problems import Operation, draw_problem, train_steps
from jaxchat.data.tinyworld.telling import Telling

TRAIN_DOCUMENTS = 24_000
VAL_DOCUMENTS = 640
DOCUMENTS = {"train": TRAIN_DOCUMENTS, "val": VAL_DOCUMENTS}
VAL_SHARE = 16  # one text in so many may only appear in val

PLOTS = (*plots_things.PLOTS, *plots_days.PLOTS)
EXERCISES: tuple[tuple[Operation, tuple[int, int], tuple[int, int]], ...] = (
    ("+", (1, 10), (1, 10)),
    ("+", (1, 20), (1, 20)),
    ("-", (2, 20), (1, 19)),
    ("*", (2, 10), (2, 10)),
    ("/", (4, 60), (2, 6)),
)
_EVERYBODY: tuple[world.Person | world.Animal, ...] = (*world.PEOPLE.values(), *world.ANIMALS.values())
_NAMES_BY_PRONOUN = {
    pronouns: tuple(somebody.name for somebody in _EVERYBODY if somebody.pronouns is pronouns) for pronouns in (SHE, HE)
}


def _story(rng: random.Random) -> str:
    telling = Telling(rng)
    pick(rng, PLOTS)(telling)
    return telling.text()


def _portrait(rng: random.Random) -> str:
    """What there is to know about somebody or something, and about what belongs to them."""
    by_subject = facts_by_subject()
    subject = pick(rng, tuple(by_subject))
    near = [key for key in by_subject if key.startswith(f"{subject}'s ") or _owner(key) == subject]
    other = pick(rng, near or tuple(by_subject))
    sentences = _told(rng, subject, between(rng, 3, 6))
    if other != subject:
        sentences += _told(rng, other, between(rng, 2, 4))
    return " ".join(sentences)


def _told(rng: random.Random, subject: str, most: int) -> list[str]:
    """Some facts about the subject, which becomes a pronoun where the sentence before leaves no doubt."""
    about = facts_by_subject()[subject]
    sentences: list[str] = []
    for fact in sample(rng, about, min(most, len(about))):
        clear = bool(sentences) and not any(
            name != subject and name in sentences[-1] for name in _NAMES_BY_PRONOUN.get(fact.pronouns, ())
        )
        sentences.append(_state(rng, fact, pronoun=clear and rng.random() < 0.7))
    return sentences


def _owner(subject: str) -> str | None:
    animal = world.ANIMALS.get(subject)
    return None if animal is None else animal.owner


def _state(rng: random.Random, fact: Fact, *, pronoun: bool) -> str:
    return fact.state(between(rng, 0, len(fact.forms) - 1), pronoun=pronoun)


@cache
def _asked_facts() -> tuple[Fact, ...]:
    return tuple(fact for fact in facts() if fact.split == "train")


def _questions(rng: random.Random) -> str:
    """Questions about train facts with their answers, one pair a line, or as talk between two people."""
    asked = sample(rng, _asked_facts(), between(rng, 3, 6))
    if rng.random() < 0.6:
        reply = rng.random() < 0.5
        return "\n".join(f"{pick(rng, fact.questions)} {_state(rng, fact, pronoun=reply)}" for fact in asked)
    told = " ".join(" ".join((*fact.questions, *fact.forms, fact.subject)) for fact in asked)
    strangers = [name for name in world.PEOPLE if name not in told]
    first, second = sample(rng, strangers, 2)
    lines = []
    for fact in asked:
        answer = _state(rng, fact, pronoun=rng.random() < 0.7).removesuffix(".")
        lines.append(f'"{pick(rng, fact.questions)}" asked {first}. "{answer}," said {second}.')
    return "\n".join(lines)


def _exercises(rng: random.Random) -> str:
    """A row of calculations, in digits, in words or both ways."""
    operation, left, right = pick(rng, EXERCISES)
    steps = sample(rng, train_steps(operation, left, right), between(rng, 5, 10))
    style = between(rng, 0, 2)
    if style == 0:
        return "\n".join(f"{step.digits}." for step in steps)
    if style == 1:
        return " ".join(f"{step.words.capitalize()}." for step in steps)
    return "\n".join(f"{step.words.capitalize()}: {step.digits}." for step in steps)


def _worked(rng: random.Random) -> str:
    """Word problems, solved or told to the end."""
    told = []
    for _ in range(between(rng, 2, 4)):
        problem = draw_problem(rng, pick(rng, ("sum", "word", "word", "steps")), "train")
        told.append(f"{problem.question} {problem.solution}" if rng.random() < 0.7 else problem.statement)
    return "\n".join(told)


def _spelling(rng: random.Random) -> str:
    told = []
    for _ in range(between(rng, 4, 8)):
        problem = draw_problem(rng, "spelling", "train")
        told.append(problem.statement if rng.random() < 0.5 else f"{problem.question} {problem.solution}")
    return "\n".join(told)


# How many documents in a hundred.
MIXTURE = ((_story, 52), (_portrait, 16), (_questions, 12), (_exercises, 5), (_worked, 11), (_spelling, 4))
_WRITERS = tuple(writer for writer, share in MIXTURE for _ in range(share))


def belongs_to(text: str) -> str:
    """The only split in which this text may appear."""
    return "val" if stable_hash("document", text) % VAL_SHARE == 0 else "train"


def document(split: str, index: int, seed: int = 0) -> str:
    """Document `index` of `train` or `val`: written again until its text falls on that side."""
    if split not in DOCUMENTS:
        raise ValueError(f"split={split!r} is neither 'train' nor 'val'")
    rng = seeded("document", seed, split, index)
    writer = pick(rng, _WRITERS)
    while True:
        text = writer(rng)
        if belongs_to(text) == split:
            return text


def documents(split: str, count: int | None = None, seed: int = 0) -> Iterator[str]:
    """`count` documents, without it DOCUMENTS[split]; a longer stream begins with a shorter one."""
    if split not in DOCUMENTS:
        raise ValueError(f"split={split!r} is neither 'train' nor 'val'")
    return (document(split, index, seed) for index in range(DOCUMENTS[split] if count is None else count))
