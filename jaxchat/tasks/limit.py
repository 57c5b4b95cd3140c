"""Which problems, questions or documents a limit takes."""

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
SEED = 1234  # Fixed, so that all models and seeds are asked the same questions.


def take(items: Sequence[Item], limit: int | None, group: Callable[[Item], Any] = lambda item: "") -> list[Item]:
    """Draws `limit` of the items, the same at every call, and returns them in their order; all without a limit.

    The sample is stratified: each group's number differs from its share of the items by less than one. A smaller limit
    takes a subset of what a larger one takes. Item j of a group of n, shuffled, gets the rank (j + u) / n, with one
    uniform u per group, and the items of the lowest ranks are taken.
    """
    if limit is None or limit >= len(items):
        return list(items)
    generator, groups = random.Random(SEED), dict[Any, list[int]]()
    for number, item in enumerate(items):
        groups.setdefault(group(item), []).append(number)
    places: list[tuple[float, int]] = []
    for numbers in groups.values():
        generator.shuffle(numbers)
        first = generator.random()
        places += [((j + first) / len(numbers), number) for j, number in enumerate(numbers)]
    return [items[number] for number in sorted(number for _, number in sorted(places)[:limit])]
