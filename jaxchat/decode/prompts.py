"""Prefill: prompts are processed in chunks of fixed lengths, after the longest prefix found in the prefix cache."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.decode import compiled
from jaxchat.model.transformer import Cache, Params, Transformer

SHORTEST_CHUNK = 16
SHORTEST_ROW = 256


def bucket(least: int, *, shortest: int, longest: int) -> int:
    """Rounds `least` up to a power of two, within `shortest` and `longest`."""
    return min(max(shortest, 1 << (least - 1).bit_length()), longest)


class Plan(NamedTuple):
    """The compiled shapes for a prompt: length of its cache row, longest chunk, and the chunk sizes in order."""

    length: int
    longest: int
    chunks: tuple[int, ...]


def plan(tokens: int, reused: int, *, prefill_chunk: int, length: int) -> Plan:
    """The plan for a prompt of `tokens` tokens whose first `reused` tokens are in the prefix cache."""
    row = bucket(tokens, shortest=SHORTEST_ROW, longest=length)
    longest = min(prefill_chunk, row)
    whole, last = divmod(tokens - reused, longest)
    chunks = (longest,) * whole
    if last:
        chunks += (bucket(last, shortest=SHORTEST_CHUNK, longest=longest),)
    return Plan(row, longest, chunks)


class Prefixes:
    """The prefix cache: caches of processed texts, evicted least recently used first."""

    def __init__(self, most_bytes: int, *, windowed: bool) -> None:
        self._most_bytes, self._windowed = most_bytes, windowed
        self._held: OrderedDict[tuple[int, ...], Cache] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        self._held.clear()

    def store(self, tokens: tuple[int, ...], cache: Cache) -> None:
        """Adds the cache of one row; it replaces entries that are a prefix of its text."""
        for other in [held for held in self._held if tokens[: len(held)] == held]:
            del self._held[other]
        self._held[tokens] = cache
        while self._held and self.size > self._most_bytes:
            self._held.popitem(last=False)

    @property
    def size(self) -> int:
        """Size of all stored caches in bytes."""
        return sum(leaf.nbytes for cache in self._held.values() for leaf in jax.tree.leaves(cache))

    def find(self, prompt: Sequence[int]) -> tuple[int, Cache] | None:
        """Returns the length of the longest usable prefix, and its cache. The last token is always computed.

        A windowed layer overwrites the positions before its window, so a windowed model can only use whole entries.
        """
        best: tuple[int, tuple[int, ...]] | None = None
        for held in self._held:
            same = common(held, prompt[:-1])
            if same and (same == len(held) or not self._windowed) and (best is None or same > best[0]):
                best = same, held
        if best is None:
            return None
        self._held.move_to_end(best[1])
        return best[0], self._held[best[1]]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two texts."""
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)


@dataclass
class Reader:
    """Prefills `rows` prompts at a time; all prompts of a call have the same plan."""

    transformer: Transformer
    rows: int

    def read(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        found: Sequence[tuple[int, Cache] | None],
        plan: Plan,
    ) -> tuple[Cache, jax.Array]:
        """Returns the cache of the prompts, one row each, and the logits after each, (R, V)."""
        cache = compiled.empty(self.transformer, self.rows, plan.length, plan.longest)
        done = [0] * len(prompts)
        for row, reused in enumerate(found):
            if reused is not None:
                done[row], source = reused
                length, last = np.int32(done[row]), np.int32(prompts[row][done[row] - 1])
                cache = compiled.recall(cache, source, np.int32(row), length, last)
        logits_RV = jnp.zeros((self.rows, self.transformer.config.vocab), jnp.float32)
        for size in plan.chunks:
            tokens_RT, positions_RT = np.zeros((self.rows, size), np.int32), np.full((self.rows, size), -1, np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[done[row] : done[row] + size]
                tokens_RT[row, : len(part)] = part
                positions_RT[row, : len(part)] = range(done[row], done[row] + len(part))
                done[row] += len(part)
            cache, logits_RV = compiled.prefill(self.transformer, params, tokens_RT, positions_RT, cache, logits_RV)
        return cache, logits_RV
