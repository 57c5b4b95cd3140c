"""Repeatable chance: seeds from a stable hash, choices from `random()` alone, and the one train and test partition."""

import hashlib
import random
from collections.abc import Sequence
from functools import cache
from typing import Literal, TypeVar

Item = TypeVar("Item")
Split = Literal["train", "test"]

TEST_PERCENT = 15


def stable_hash(*key: object) -> int:
    """A 64-bit hash of the printed key, the same in every process and version of Python."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest(), "big")


def seeded(*key: object) -> random.Random:
    """A generator that is a pure function of the key."""
    return random.Random(stable_hash(*key))


@cache
def partition(*key: object) -> Split:
    """The side on which a problem lies, whatever seed draws it: `test` for about TEST_PERCENT of all keys."""
    return "test" if stable_hash("partition", *key) % 100 < TEST_PERCENT else "train"


def pick(rng: random.Random, options: Sequence[Item]) -> Item:
    """One of the options. Python promises the sequence of `random()` across versions, of `choice()` it does not."""
    return options[int(rng.random() * len(options))]


def between(rng: random.Random, low: int, high: int) -> int:
    """A whole number, low <= number <= high."""
    return low + int(rng.random() * (high - low + 1))


def sample(rng: random.Random, options: Sequence[Item], count: int) -> list[Item]:
    """`count` different options in random order."""
    left = list(options)
    return [left.pop(int(rng.random() * len(left))) for _ in range(count)]
