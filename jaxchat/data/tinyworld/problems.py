"""Arithmetic and spelling with train and test disjoint by construction, and word problems about the village.

What is held out is the number fact, not its wording. A sum and its two differences are one key, so are a product and
its quotients; a problem in two steps has a third key of its own. A problem is on the test side where any of its keys
is, so no train problem, in whatever words, shows a test fact. The pretraining text draws from the train side only.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from jaxchat.data.tinyworld import world
from jaxchat.data.tinyworld.chance import Split, between, partition, pick, sample, seeded
from jaxchat.data.tinyworld.english import number_word
from jaxchat.data.tinyworld.telling import Telling

Kind = Literal["sum", "word", "steps", "spelling"]
Operation = Literal["+", "-", "*", "/"]

KINDS: tuple[Kind, ...] = ("sum", "word", "steps", "spelling")
LARGEST_ADDEND = 20
LARGEST_FACTOR = 10
SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


@dataclass(frozen=True)
class Step:
    """One calculation with whole numbers."""

    left: int
    operation: Operation
    right: int

    @property
    def result(self) -> int:
        if self.operation == "+":
            return self.left + self.right
        if self.operation == "-":
            return self.left - self.right
        return self.left * self.right if self.operation == "*" else self.left // self.right

    @property
    def key(self) -> tuple[str, int, int]:
        """What is held out: the family of facts this one belongs to, 7 + 5 and 5 + 7 and 12 - 5."""
        parts = (self.left, self.right) if self.operation in "+*" else (self.result, self.right)
        return ("sum" if self.operation in "+-" else "product", min(parts), max(parts))

    @property
    def digits(self) -> str:
        return f"{self.left} {self.operation} {self.right} = {self.result}"

    @property
    def words(self) -> str:
        spoken = f"{number_word(self.left)} {SPOKEN[self.operation]} {number_word(self.right)}"
        return f"{spoken} is {number_word(self.result)}"


@dataclass(frozen=True)
class Problem:
    """A question, its checkable answer and a worked solution, which always ends with the answer and a full stop."""

    kind: Kind
    question: str
    answer: str
    solution: str
    statement: str
    keys: tuple[tuple[str | int, ...], ...]

    @property
    def split(self) -> Split:
        return "test" if any(partition(*key) == "test" for key in self.keys) else "train"


@cache
def train_steps(operation: Operation, left: tuple[int, int], right: tuple[int, int]) -> tuple[Step, ...]:
    """Every calculation of the train side with operands in these inclusive ranges and a positive whole result."""
    steps = (Step(a, operation, b) for a in range(left[0], left[1] + 1) for b in range(right[0], right[1] + 1))
    return tuple(step for step in steps if _allowed(step) and partition(*step.key) == "train")


def _allowed(step: Step) -> bool:
    if step.operation == "/":
        return step.left % step.right == 0 and step.result <= LARGEST_FACTOR
    return step.result > 0


def draw_step(rng: random.Random, operation: Operation) -> Step:
    """A calculation of either side, within LARGEST_ADDEND and LARGEST_FACTOR."""
    if operation in "+-":
        small, other = between(rng, 1, LARGEST_ADDEND), between(rng, 1, LARGEST_ADDEND)
        return Step(small, "+", other) if operation == "+" else Step(small + other, "-", other)
    small, other = between(rng, 2, LARGEST_FACTOR), between(rng, 2, LARGEST_FACTOR)
    return Step(small, "*", other) if operation == "*" else Step(small * other, "/", other)


ROUND_THE_HOUSE = ("coin", "shell", "stamp", "button", "book", "pencil", "flower", "stone", "card", "feather", "marble")
ITEMS = (
    *((food.singular, food.plural) for food in world.FOODS.values()),
    *((noun, f"{noun}s") for noun in ROUND_THE_HOUSE),
)
# Setup, question, statement; {x} and {y} are counted things ("3 apples"), {z} the bare second number.
WORD_PROBLEMS: dict[Operation, tuple[tuple[str, str, str], ...]] = {
    "+": (
        (
            "{a} has {x}. {b} gives {a.them} {z} more.",
            "How many {many} does {a} have now?",
            "Now {a.they} has {total}.",
        ),
        ("{a} finds {x}. Then {a.they} finds {z} more.", "How many {many} does {a} find?", "{a} finds {total}."),
        (
            "There is a basket with {x} in it. {a} puts {y} into the basket.",
            "How many {many} are in the basket?",
            "The basket holds {total}.",
        ),
        (
            "{a} has {x} and {b} has {y}.",
            "How many {many} do {a} and {b} have together?",
            "Together {a} and {b} have {total}.",
        ),
    ),
    "-": (
        ("{a} has {x}. {a.they} gives {b} {y}.", "How many {many} does {a} have left?", "{a} has {total} left."),
        ("{a} buys {x}. On the way home {a.they} loses {y}.", "How many {many} are left?", "{a} brings home {total}."),
        (
            "There is a box with {x} in it. {a} takes out {y}.",
            "How many {many} stay in the box?",
            "The box still holds {total}.",
        ),
    ),
    "*": (
        (
            "{a} has {n} bags. There are {m} {many} in each bag.",
            "How many {many} does {a} have?",
            "{a} has {total}.",
        ),
        ("{n} friends each bring {m} {many} to {a}.", "How many {many} do they bring?", "They bring {total}."),
    ),
    "/": (
        (
            "{a} has {x}. {a.they} shares the {many} fairly among {z} friends.",
            "How many {many} does each friend get?",
            "Each friend gets {total}.",
        ),
        (
            "{a} puts {x} into {z} boxes, the same number in each.",
            "How many {many} are in each box?",
            "Each box holds {total}.",
        ),
    ),
}
SECOND_STEPS: dict[Operation, tuple[str, ...]] = {
    "+": ("Then {a.they} gets {z} more.", "Then {a.they} finds {z} more."),
    "-": ("Then {a.they} loses {z}.", "Then {a.they} gives away {z}."),
}
FIRST_STEPS: dict[Operation, tuple[str, ...]] = {
    "+": ("{a} has {x}. {b} gives {a.them} {z} more.", "{a} finds {x} and buys {z} more."),
    "-": ("{a} has {x}. {a.they} sells {z}.", "{a} has {x}. {a.they} gives {b} {z}."),
    "*": ("{a} has {n} bags with {m} {many} in each.",),
}


def counted(number: int, item: tuple[str, str]) -> str:
    """`1 apple`, `3 apples`."""
    return f"{number} {item[0] if number == 1 else item[1]}"


def _telling(rng: random.Random) -> tuple[Telling, tuple[str, str]]:
    telling = Telling(rng)
    a, b = sample(rng, list(world.PEOPLE.values()), 2)
    item = pick(rng, ITEMS)
    telling.cast(a=a, b=b)
    telling.know(many=item[1])
    return telling, item


def _know_step(telling: Telling, step: Step, item: tuple[str, str]) -> None:
    telling.know(x=counted(step.left, item), y=counted(step.right, item), z=step.right, n=step.left, m=step.right)
    telling.know(total=counted(step.result, item))


def _sum(rng: random.Random) -> Problem:
    step = draw_step(rng, pick(rng, ("+", "-", "*", "/")))
    in_digits = step.digits.partition(" =")[0]
    in_words = step.words.partition(" is")[0]
    question = pick(rng, ("What is {0}?", "How much is {0}?", "What is {1}?", "Can you tell me what {1} is?"))
    solution = f"{step.digits}. The answer is {step.result}."
    statement = f"{step.words.capitalize()}."
    return Problem("sum", question.format(in_digits, in_words), str(step.result), solution, statement, (step.key,))


def _word(rng: random.Random) -> Problem:
    step = draw_step(rng, pick(rng, ("+", "+", "-", "-", "*", "/")))
    telling, item = _telling(rng)
    _know_step(telling, step, item)
    setup, question, statement = pick(rng, WORD_PROBLEMS[step.operation])
    telling.say(setup)
    said = len(telling.text()) + 1
    telling.say(question)
    asked = len(telling.text()) + 1
    telling.say(statement)
    text = telling.text()
    solution = f"{step.digits}. The answer is {step.result}."
    return Problem(
        "word", text[: asked - 1], str(step.result), solution, f"{text[: said - 1]} {text[asked:]}", (step.key,)
    )


def _steps(rng: random.Random) -> Problem:
    first = pick(rng, (draw_step(rng, "+"), draw_step(rng, "-"), Step(between(rng, 2, 5), "*", between(rng, 2, 5))))
    operation: Operation = pick(rng, ("+", "-")) if first.result > 1 else "+"
    most = LARGEST_ADDEND if operation == "+" else min(LARGEST_ADDEND, first.result - 1)
    second = Step(first.result, operation, between(rng, 1, most))
    telling, item = _telling(rng)
    _know_step(telling, first, item)
    telling.say(*FIRST_STEPS[first.operation])
    telling.know(z=second.right)
    telling.say(*SECOND_STEPS[operation])
    setup = telling.text()
    question = f"{setup} How many {item[1]} does {telling.name('a')} have now?"
    solution = f"{first.digits}. {second.digits}. The answer is {second.result}."
    statement = f"{setup} Now {telling.name('a')} has {counted(second.result, item)}."
    whole = ("steps", first.operation, first.left, first.right, operation, second.right)
    keys = (first.key, second.key, whole)
    return Problem("steps", question, str(second.result), solution, statement, keys)


@cache
def spelling_words() -> tuple[str, ...]:
    """Every word of the world that is worth spelling, in alphabetical order."""
    words = set(world.MORE_WORDS.split())
    words.update(food.singular for food in world.FOODS.values())
    words.update(thing.noun for thing in world.THINGS.values())
    words.update(animal.species for animal in world.ANIMALS.values())
    words.update(person.colour for person in world.PEOPLE.values())
    words.update(place.name for place in world.PLACES.values() if " " not in place.name)
    return tuple(sorted(words))


def spelled(word: str) -> str:
    """`l-a-m-p`."""
    return "-".join(word)


def _spelling(rng: random.Random) -> Problem:
    word = pick(rng, spelling_words())
    spelling = f"The word {word} is spelled {spelled(word)}."
    question, answer = pick(
        rng,
        (
            (f"How do you spell {word}?", spelled(word)),
            (f"Can you spell the word {word}?", spelled(word)),
            (f"How many letters does the word {word} have?", str(len(word))),
            (f"What is the first letter of {word}?", word[0]),
            (f"What is the last letter of {word}?", word[-1]),
        ),
    )
    solution = spelling if "-" in answer else f"{spelling} The answer is {answer}."
    return Problem("spelling", question, answer, solution, spelling, (("spelling", word),))


_MAKERS = {"sum": _sum, "word": _word, "steps": _steps, "spelling": _spelling}


def draw_problem(rng: random.Random, kind: Kind, split: Split) -> Problem:
    """A random problem of that kind on that side of the partition."""
    while True:
        problem = _MAKERS[kind](rng)
        if problem.split == split:
            return problem


def problems(split: Split, count: int, seed: int = 0, *, kinds: tuple[Kind, ...] = KINDS) -> Iterator[Problem]:
    """`count` problems with different questions, the kinds taking turns; a longer stream begins with a shorter one.

    Raises ValueError where the world has not that many: bare sums and spellings are few, word problems are not.
    """
    seen: set[str] = set()
    for index in range(count):
        rng = seeded("problem", seed, split, index)
        kind = kinds[index % len(kinds)]
        for _ in range(2000):
            problem = draw_problem(rng, kind, split)
            if problem.question not in seen:
                break
        else:
            raise ValueError(
                f"no more than {index} different problems of {kinds} on the {split} side; asked for {count}"
            )
        seen.add(problem.question)
        yield problem
