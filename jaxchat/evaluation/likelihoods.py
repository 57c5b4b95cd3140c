"""Log-likelihoods of continuations given their contexts, batched by length; shared contexts are computed once."""

import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import sharding, signals
from jaxchat.decode import programs
from jaxchat.decode.prompts import bucket
from jaxchat.errors import NOT_FINITE, UserError
from jaxchat.model.transformer import Params, Transformer
from jaxchat.objectives.logprobs import score_tokens

BATCH_TOKENS = {"cpu": 2048, "gpu": 65536, "tpu": 65536}
SHORTEST = 32  # Minimum row length; shorter rows are not faster.
IN_FLIGHT = 2


class Item(NamedTuple):
    """Context tokens and the continuation to score, at least one token each."""

    context: Sequence[int]
    continuation: Sequence[int]


class Scored(NamedTuple):
    """Scores of a continuation: the log-probability of each remaining token in nats, float32 (tokens,); whether every
    token is the most likely one; and the number of tokens of the item that were truncated from the left.
    """

    logprobs: np.ndarray
    greedy: bool
    truncated: int


@dataclass
class _Row:
    """Input tokens, positions `at` after which `targets` are scored, and each target's (item, place) in `owners`."""

    tokens: list[int]
    at: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    owners: list[tuple[int, int]] = field(default_factory=list)


class _Tree(NamedTuple):
    """A context and the numbers of the items that share it."""

    context: list[int]
    items: list[int]


class Scorer:
    """Scores items in batches with one compiled shape per row size; a score does not depend on the rest of its batch.

    An item of more than `length` + 1 tokens is truncated from the left. Items with equal contexts share computation: if
    all continuations are single tokens (letters), one row scores them all; otherwise the keys and values of the context
    are computed once and copied for each continuation. A mesh shards the rows over its batch axes.
    """

    def __init__(
        self,
        transformer: Transformer,
        params: Params,
        *,
        mesh: jax.sharding.Mesh | None = None,
        length: int,
        batch_tokens: int | None = None,
    ) -> None:
        if length < 1 or (batch_tokens is not None and batch_tokens < 1):
            raise ValueError(f"length={length} and batch_tokens={batch_tokens} must be at least 1")
        self.transformer, self.length, self._mesh = transformer, length, mesh
        self._batch_tokens = batch_tokens or BATCH_TOKENS.get(jax.default_backend(), 2048)
        replicated = None if mesh is None else sharding.replicated(mesh)
        self._rows = jax.jit(functools.partial(score_rows, transformer), out_shardings=replicated)
        self._trees = jax.jit(functools.partial(score_trees, transformer), out_shardings=replicated)
        self.load(params)

    def load(self, params: Params) -> None:
        """Replaces the parameters."""
        with self._on_mesh():
            self.params = programs.by_layer(self.transformer, params)

    def unload(self) -> None:
        """Frees the parameters; call `load` before the next items."""
        self.params = {}

    def __call__(self, items: Sequence[Item]) -> list[Scored]:
        """Scores of the items, in the same order."""
        scores = dict(self.stream(items))
        return [scores[i] for i in range(len(items))]

    def stream(self, items: Sequence[Item]) -> Iterator[tuple[int, Scored]]:
        """Yields the number and score of each item as soon as they are computed.

        Raises:
            ValueError: a context or continuation is empty.
            UserError: a likelihood is not finite.
        """
        fitted = [self._fit(item) for item in items]
        rows, trees = _group([item for item, _ in fitted])
        answers = [np.zeros(len(item.continuation), np.float32) for item, _ in fitted]
        missing, greedy = [len(item.continuation) for item, _ in fitted], [True] * len(fitted)
        batches = self._row_batches(rows), self._tree_batches(trees, [item for item, _ in fitted])
        for owners, logprobs, most_likely in self._run(batches):
            for (number, place), logprob, likeliest in zip(owners, logprobs, most_likely):
                answers[number][place] = logprob
                greedy[number] &= bool(likeliest)
                missing[number] -= 1
                if not missing[number]:
                    yield number, Scored(answers[number], greedy[number], fitted[number][1])

    def _fit(self, item: Item) -> tuple[Item, int]:
        """Truncates an item from the left to `length` + 1 tokens; returns it and the number of tokens cut."""
        context, continuation = list(item.context), list(item.continuation)
        if not context or not continuation:
            raise ValueError("an item needs a context and a continuation of at least one token each")
        over = max(len(context) + len(continuation) - self.length - 1, 0)
        if over < len(context):
            return Item(context[over:], continuation), over
        beyond = over - len(context) + 1  # The first remaining token of the continuation becomes the context.
        return Item(continuation[beyond - 1 : beyond], continuation[beyond:]), over

    def _run(self, batches: Iterable[Iterator[Any]]) -> Iterator[tuple[list[Any], np.ndarray, np.ndarray]]:
        """Yields owners, log-probabilities and greedy flags per batch; `IN_FLIGHT` batches are dispatched ahead."""
        in_flight: deque[Any] = deque()
        for kind in batches:
            for program, owners, arrays in kind:
                signals.check()
                with self._on_mesh():
                    in_flight.append((owners, program(self.params, *map(self._put, arrays))))
                if len(in_flight) > IN_FLIGHT:
                    yield _fetch(*in_flight.popleft())
        while in_flight:
            yield _fetch(*in_flight.popleft())

    def _row_batches(self, rows: list[_Row]) -> Iterator[Any]:
        shape = lambda row: (row_size(len(row.tokens), self.length), answer_size(len(row.at)))  # noqa: E731
        for (T, N), batch in _batches(rows, shape, lambda T, N: self._count(T)):
            B = self._count(T)
            tokens_BT, at_BN, targets_BN = (np.zeros((B, n), np.int32) for n in (T, N, N))
            owners = []
            for b, row in enumerate(batch):
                tokens_BT[b, : len(row.tokens)] = row.tokens
                at_BN[b, : len(row.at)], targets_BN[b, : len(row.at)] = row.at, row.targets
                owners += [(b, n, owner) for n, owner in enumerate(row.owners)]
            yield self._rows, owners, (tokens_BT, at_BN, targets_BN)

    def _tree_batches(self, trees: list[_Tree], items: Sequence[Item]) -> Iterator[Any]:
        def shape(tree: _Tree) -> tuple[int, int, int]:
            longest = max(len(items[i].continuation) for i in tree.items)
            copies = bucket(len(tree.items), shortest=2)
            return row_size(len(tree.context) - 1, self.length), copies, bucket(longest, shortest=4)

        for (T, K, C), batch in _batches(trees, shape, self._tree_count):
            B = self._tree_count(T, K, C)
            context_BT, length_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
            read_BKC, targets_BKC = (np.zeros((B, K, C), np.int32) for _ in range(2))
            owners = []
            for b, tree in enumerate(batch):
                length_B[b] = len(tree.context) - 1
                context_BT[b, : length_B[b]] = tree.context[:-1]
                for k, number in enumerate(tree.items):
                    answer = list(items[number].continuation)
                    read_BKC[b, k, : len(answer)] = [tree.context[-1], *answer[:-1]]
                    targets_BKC[b, k, : len(answer)] = answer
                    owners += [(b, k * C + c, (number, c)) for c in range(len(answer))]
            yield self._trees, owners, (context_BT, length_B, read_BKC, targets_BKC)

    def _count(self, T: int) -> int:
        """Rows per batch of length T within the token budget: a multiple of the mesh's batch shards."""
        shards = 1 if self._mesh is None else sharding.shards(self._mesh)
        return max(self._batch_tokens // T // shards, 1) * shards

    def _tree_count(self, T: int, K: int, C: int) -> int:
        # Copying a context costs memory and time, but less than recomputing it. There are many shapes with few trees
        # each, so large batches would be half empty.
        return self._count(2 * max(T, K * (T + C) // 4))

    def _put(self, array: np.ndarray) -> jax.Array:
        if self._mesh is None:
            return jnp.asarray(array)
        placed = sharding.by_rows(self._mesh)
        return jax.make_array_from_callback(array.shape, placed, lambda index: array[index])

    def _on_mesh(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def score_rows(
    transformer: Transformer, params: Params, tokens_BT: jax.Array, at_BN: jax.Array, targets_BN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities (B, N) of targets after positions `at_BN`, and whether each target is the most likely token."""
    hidden_BTM = transformer.apply(params, tokens_BT).hidden
    hidden_BNM = jnp.take_along_axis(hidden_BTM, at_BN[..., None], axis=1)
    return _scores(transformer, params, hidden_BNM, targets_BN)


def score_trees(
    transformer: Transformer,
    params: Params,
    context_BT: jax.Array,
    length_B: jax.Array,
    read_BKC: jax.Array,
    targets_BKC: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Like `score_rows` for K continuations of each of B contexts, which are computed once; results are (B, K * C).

    `context_BT` holds `length_B` tokens each, the contexts without their last token. `read_BKC` holds the last token of
    the context and the continuation without its last token.
    """
    (B, T), (_, K, C) = context_BT.shape, read_BKC.shape
    positions_BT = jnp.where(jnp.arange(T)[None] < length_B[:, None], jnp.arange(T)[None], -1)
    empty = programs.empty(transformer, B, T + C, max(T, C))
    cache = transformer.apply(params, context_BT, positions_BT=positions_BT, cache=empty).cache
    copies = programs.shard_cache(jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), cache))
    after_NC = jnp.repeat(length_B, K)[:, None] + jnp.arange(C)[None]
    hidden_NCM = transformer.apply(params, read_BKC.reshape(B * K, C), positions_BT=after_NC, cache=copies).hidden
    hidden_BNM = hidden_NCM.reshape(B, K * C, -1)
    return _scores(transformer, params, hidden_BNM, targets_BKC.reshape(B, K * C))


def _scores(transformer: Transformer, params: Params, hidden_BNM: jax.Array, targets_BN: jax.Array) -> Any:
    c, head = transformer.config, transformer.head(params)
    scores = score_tokens(hidden_BNM, head, targets_BN, vocab=c.vocab, softcap=c.softcap)
    return scores.logprob_BT, scores.greedy_BT


def _group(items: Sequence[Item]) -> tuple[list[_Row], list[_Tree]]:
    """Groups items by context: into rows, of one item or of single-token continuations, and into trees."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(tuple(item.context), []).append(number)
    rows, trees = [], []
    for context, numbers in groups.items():
        if all(len(items[number].continuation) == 1 for number in numbers):
            at = [len(context) - 1] * len(numbers)
            targets = [items[number].continuation[0] for number in numbers]
            rows.append(_Row(list(context), at, targets, [(number, 0) for number in numbers]))
        elif len(numbers) > 1 and len(context) > SHORTEST // 2:
            trees.append(_Tree(list(context), numbers))
        else:
            rows += [_row(items[number], number) for number in numbers]
    return rows, trees


def _row(item: Item, number: int) -> _Row:
    answer, start = list(item.continuation), len(item.context) - 1
    places = list(range(len(answer)))
    return _Row([*item.context, *answer[:-1]], [start + i for i in places], answer, [(number, i) for i in places])


def _batches(inputs: list[Any], shape: Any, limit: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Splits inputs, largest shape first, into batches of equal shape with at most `limit(*shape)` inputs."""
    for same, group in itertools.groupby(sorted(inputs, key=shape, reverse=True), shape):
        equal, count = list(group), limit(*same)
        for start in range(0, len(equal), count):
            yield same, equal[start : start + count]


def _fetch(owners: list[Any], arrays: Any) -> tuple[list[Any], np.ndarray, np.ndarray]:
    logprobs_BN, greedy_BN = jax.device_get(arrays)
    rows, columns = np.asarray([b for b, _, _ in owners]), np.asarray([n for _, n, _ in owners])
    logprobs = logprobs_BN[rows, columns]
    if not np.isfinite(logprobs).all():
        raise UserError(NOT_FINITE)
    return [owner for _, _, owner in owners], logprobs, greedy_BN[rows, columns]


def row_size(tokens: int, length: int) -> int:
    """Padded length of a row of `tokens`: a power of two or 3/4 of one, at least `SHORTEST` and at most `length`."""
    power = bucket(tokens, shortest=SHORTEST)
    return min(power * 3 // 4 if tokens <= power * 3 // 4 and power > SHORTEST else power, length)


def answer_size(tokens: int) -> int:
    """Padded number of predictions per row: the smallest of 4, 16, 64, ... that is at least `tokens`."""
    size = 4
    while size < tokens:
        size *= 4
    return size
