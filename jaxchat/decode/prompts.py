"""Sizes of an engine, and prefill: prompts are read in chunks of fixed lengths, after their longest stored prefix."""

import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.decode import programs
from jaxchat.model.transformer import Cache, Params, Transformer

SHORTEST_CHUNK = 16
SHORTEST_ROW = 256


def bucket(least: int, *, shortest: int, longest: int = sys.maxsize) -> int:
    """Rounds `least` up to a power of two, within `shortest` and `longest`."""
    return min(max(shortest, 1 << (least - 1).bit_length()), longest)


@dataclass(frozen=True)
class EngineConfig:
    """Static sizes of an engine. Changing any of them compiles new programs.

    Attributes:
        length: context length, in positions per cache row.
        slots: maximum number of samples decoded at the same time.
        steps: decoding steps per dispatch.
        prefill_chunk: maximum number of prompt tokens processed in one prefill call.
        prefill_batch: number of prompts prefilled together.
        adapt: shrink the batch and the cache to the smallest power of two that fits the active requests. If false, all
            requests use one compiled shape, so results are identical bit for bit.
        prefix_cache_bytes: memory limit of the prefix cache.
    """

    length: int
    slots: int = 8
    steps: int = 8
    prefill_chunk: int = 512
    prefill_batch: int = 1
    adapt: bool = True
    prefix_cache_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("length", "slots", "steps", "prefill_chunk", "prefill_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class PrefillPlan(NamedTuple):
    """The compiled shapes for a prompt: length of its cache row, longest chunk, and the chunk sizes in order."""

    length: int
    longest: int
    chunks: tuple[int, ...]


def plan_prefill(tokens: int, reused: int, shape: EngineConfig) -> PrefillPlan:
    """The plan for a prompt of `tokens` tokens whose first `reused` tokens are in the prefix cache."""
    row = bucket(tokens, shortest=SHORTEST_ROW, longest=shape.length)
    longest = min(shape.prefill_chunk, row)
    whole, last = divmod(tokens - reused, longest)
    chunks = (longest,) * whole
    if last:
        chunks += (bucket(last, shortest=SHORTEST_CHUNK, longest=longest),)
    return PrefillPlan(row, longest, chunks)


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


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common prefix of two texts."""
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)


def next_chunk(texts: Sequence[Sequence[int]], done: list[int], *, rows: int, size: int) -> tuple[Any, Any]:
    """The next `size` tokens of each text and their positions, (rows, size); padding has position -1.

    `done` counts the tokens of each text that were returned before; it is updated.
    """
    tokens_RT, positions_RT = np.zeros((rows, size), np.int32), np.full((rows, size), -1, np.int32)
    for row, text in enumerate(texts):
        part = text[done[row] : done[row] + size]
        tokens_RT[row, : len(part)] = part
        positions_RT[row, : len(part)] = range(done[row], done[row] + len(part))
        done[row] += len(part)
    return tokens_RT, positions_RT


def read(
    transformer: Transformer,
    params: Params,
    prompts: Sequence[Sequence[int]],
    found: Sequence[tuple[int, Cache] | None],
    plan: PrefillPlan,
    *,
    rows: int,
) -> Iterator[tuple[Cache, jax.Array] | None]:
    """Prefills prompts that have the same plan, one chunk each per iteration. Yields None until the last chunk, then
    their cache, one row each, and the logits after each, (R, V).

    `found` are their prefixes in the prefix cache (see `Prefixes.find`).
    """
    cache = programs.empty(transformer, rows, plan.length, plan.longest)
    done = [0] * len(prompts)
    for row, reused in enumerate(found):
        if reused is not None:
            done[row], source = reused
            length_1, last_1 = np.array([[done[row]], [prompts[row][done[row] - 1]]], np.int32)
            source = source._replace(length_B=length_1, last_B=last_1)
            cache = programs.seat(cache, source, np.zeros(1, np.int32), np.array([row], np.int32))
    logits_RV = jnp.zeros((rows, transformer.config.vocab), jnp.float32)
    for left, size in zip(reversed(range(len(plan.chunks))), plan.chunks):
        chunk = next_chunk(prompts, done, rows=rows, size=size)
        cache, logits_RV = programs.prefill(transformer, params, *chunk, cache, logits_RV)
        yield None if left else (cache, logits_RV)
