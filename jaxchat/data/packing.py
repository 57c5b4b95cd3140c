"""Packs documents into rows of one length, by three rules.

A document is the sequence BOS t1 .. tn. A BOS that follows another document in the same row is a training target: it
marks the end of that document.

    best_fit     A document longer than a row is split into parts that overlap by one token. The first token of a
                 continuation is input only, so every token is a target exactly once and none is lost. Parts shorter
                 than a row are packed best-fit-decreasing; free space becomes padding.
    concatenate  The documents form one stream, which is split at row boundaries with the same overlap. Only the last
                 row has padding; nearly every row starts in the middle of a document.
    crop         nanochat's loader: repeatedly takes the longest buffered document that fits. If none fits, the
                 shortest is cropped to fill the row and the rest of it is discarded.

Conversations are packed by `pack_whole`: best fit without splitting; conversations longer than a row are left out.

Shapes: N all tokens, D documents, C conversations, P parts, R rows, S ids of a row (row_length + 1).
"""

import bisect
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxchat.data.batch import START, TARGET

Rule = Literal["best_fit", "concatenate", "crop"]
CROP_BUFFER = 1000  # documents nanochat's loader chooses from


class Packed(NamedTuple):
    """Rows and statistics of the documents; tokens are counted without BOS, padding in ids."""

    ids_RS: np.ndarray
    flags_RS: np.ndarray
    tokens: int
    discarded: int
    padding: int
    cut: int  # documents that are not contained whole in one row
    too_long: int = 0  # conversations left out


class Parts(NamedTuple):
    """Slices of the token stream and their rows. `row_P` never decreases; the parts of a row are in their order."""

    start_P: np.ndarray
    length_P: np.ndarray
    row_P: np.ndarray


def pack(documents: Sequence[np.ndarray], row_length: int, rule: Rule, *, bos: int, dtype: np.dtype) -> Packed:
    """Packs documents, each given without its BOS, into rows of row_length + 1 ids; ignores empty documents."""
    lengths_D = np.array([len(document) + 1 for document in documents if len(document)], np.int64)
    starts_D = np.cumsum(lengths_D) - lengths_D
    ids_N = np.full(int(lengths_D.sum()), bos, dtype)
    for start, document in zip(starts_D.tolist(), (document for document in documents if len(document)), strict=True):
        ids_N[start + 1 : start + 1 + len(document)] = document
    parts = RULES[rule](starts_D, lengths_D, row_length)
    return _lay_out(ids_N, starts_D, lengths_D, parts, row_length=row_length, bos=bos)


def pack_whole(
    conversations: Sequence[tuple[Sequence[int], Sequence[bool]]], row_length: int, *, bos: int, dtype: np.dtype
) -> Packed:
    """Packs conversations, each (ids from BOS on, loss mask), into rows of row_length + 1 ids.

    A conversation becomes one segment of one row; it is left out if it has more than row_length + 1 ids. Its first id
    is never a target. If every conversation has a later target, then so has every row.
    """
    fitting = [(ids, mask) for ids, mask in conversations if len(ids) <= row_length + 1]
    row_C = best_fit([len(ids) for ids, _ in fitting], row_length + 1)
    rows = int(row_C.max()) + 1 if fitting else 0
    ids_RS = np.full((rows, row_length + 1), bos, dtype)
    flags_RS = np.zeros((rows, row_length + 1), np.uint8)
    filled_R = [0] * rows
    for row, (ids, mask) in zip(row_C.tolist(), fitting):
        start, stop = filled_R[row], filled_R[row] + len(ids)
        ids_RS[row, start:stop] = ids
        flags_RS[row, start:stop] = np.where(mask, TARGET, 0)
        flags_RS[row, start] = START
        filled_R[row] = stop
    for row, filled in enumerate(filled_R):
        if filled <= row_length:
            flags_RS[row, filled] = START
    tokens = sum(len(ids) - 1 for ids, _ in fitting)
    return Packed(
        ids_RS,
        flags_RS,
        tokens=tokens,
        discarded=sum(len(ids) - 1 for ids, _ in conversations) - tokens,
        padding=rows * (row_length + 1) - sum(filled_R),
        cut=0,
        too_long=len(conversations) - len(fitting),
    )


def best_fit(lengths: Sequence[int], capacity: int) -> np.ndarray:
    """Assigns lengths to rows, longest first: each to the fullest row with enough space, or to a new row.

    Returns the row of each length, int64 (C,), numbered from 0. A row holds at most `capacity`, and none is empty.
    """
    lengths_C = np.asarray(lengths, np.int64)
    if len(lengths_C) and not 1 <= lengths_C.min() <= lengths_C.max() <= capacity:
        raise ValueError(f"lengths from {lengths_C.min()} to {lengths_C.max()} must lie between 1 and {capacity}")
    order_C = np.argsort(-lengths_C, kind="stable")
    row_C = np.empty(len(lengths_C), np.int64)
    row_C[order_C] = _best_fit_decreasing(lengths_C[order_C].tolist(), capacity)
    return row_C


def _best_fit(starts_D: np.ndarray, lengths_D: np.ndarray, row_length: int) -> Parts:
    full_D = (lengths_D - 1) // row_length
    rest_D = lengths_D - full_D * row_length
    full_rows = int(full_D.sum())
    # Full row j of a document starts at its token j * row_length, so consecutive rows overlap by one token.
    ordinal_R = np.arange(full_rows) - np.repeat(np.cumsum(full_D) - full_D, full_D)
    full_start_R = np.repeat(starts_D, full_D) + ordinal_R * row_length
    open_D = np.flatnonzero(rest_D > 1)
    order_P = open_D[np.argsort(-rest_D[open_D], kind="stable")]
    row_P = full_rows + _best_fit_decreasing(rest_D[order_P].tolist(), row_length + 1)
    by_row_P = np.argsort(row_P, kind="stable")
    order_P, row_P = order_P[by_row_P], row_P[by_row_P]
    return Parts(
        np.concatenate([full_start_R, starts_D[order_P] + full_D[order_P] * row_length]),
        np.concatenate([np.full(full_rows, row_length + 1), rest_D[order_P]]),
        np.concatenate([np.arange(full_rows), row_P]),
    )


def _best_fit_decreasing(lengths: list[int], capacity: int) -> np.ndarray:
    """`best_fit` for lengths in descending order."""
    rows_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set if a row has s free ids; the tightest fit is the lowest set bit from `length` on
    rows = 0
    chosen = []
    for length in lengths:
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, rows
            rows += 1
        chosen.append(row)
        if space > length:
            rows_by_space[space - length].append(row)
            spaces |= 1 << (space - length)
    return np.array(chosen, np.int64)


def _concatenate(starts_D: np.ndarray, lengths_D: np.ndarray, row_length: int) -> Parts:
    total = int(lengths_D.sum())
    borders = np.arange(0, total - 1, row_length)
    start_P = np.union1d(borders, starts_D).astype(np.int64)
    stop_P = np.append(start_P[1:], total)[: len(start_P)]
    # The row before a border also holds the id at the border, as its last target.
    stop_P[:-1] += np.isin(start_P[1:], borders)
    return Parts(start_P, stop_P - start_P, start_P // row_length)


def _crop(starts_D: np.ndarray, lengths_D: np.ndarray, row_length: int) -> Parts:
    lengths, starts = lengths_D.tolist(), starts_D.tolist()
    waiting: dict[int, deque[int]] = {}  # buffered documents by length
    known: list[int] = []  # the lengths in `waiting`, sorted
    parts: list[tuple[int, int, int]] = []
    buffered = read = row = 0

    def take(length: int) -> int:
        queue = waiting[length]
        document = queue.popleft()
        if not queue:
            del waiting[length]
            known.pop(bisect.bisect_left(known, length))
        return document

    while buffered or read < len(lengths):
        space = row_length + 1
        while space:
            while buffered < CROP_BUFFER and read < len(lengths):
                if lengths[read] not in waiting:
                    waiting[lengths[read]] = deque()
                    bisect.insort(known, lengths[read])
                waiting[lengths[read]].append(read)
                buffered, read = buffered + 1, read + 1
            if not buffered:
                break
            fit = bisect.bisect_right(known, space)
            length = known[fit - 1] if fit else known[0]
            parts.append((starts[take(length)], min(length, space), row))
            buffered -= 1
            space -= parts[-1][1]
        row += 1
    return Parts(*np.array(parts, np.int64).reshape(-1, 3).T)


RULES: dict[str, Callable[[np.ndarray, np.ndarray, int], Parts]] = {
    "best_fit": _best_fit,
    "concatenate": _concatenate,
    "crop": _crop,
}


def _lay_out(
    ids_N: np.ndarray, starts_D: np.ndarray, lengths_D: np.ndarray, parts: Parts, *, row_length: int, bos: int
) -> Packed:
    start_P, length_P, row_P = parts
    rows = int(row_P[-1]) + 1 if len(row_P) else 0
    before_P = np.cumsum(length_P) - length_P
    first_P = np.diff(row_P, prepend=-1) > 0
    # Offset of a part in its row: the ids before the part minus the ids before the row's first part.
    at_P = before_P - np.repeat(before_P[first_P], np.bincount(row_P, minlength=rows))
    within_N = np.arange(int(length_P.sum())) - np.repeat(before_P, length_P)
    from_N = np.repeat(start_P, length_P) + within_N
    to_N = np.repeat(row_P * (row_length + 1) + at_P, length_P) + within_N

    ids_RS = np.full((rows, row_length + 1), bos, ids_N.dtype)
    flags_RS = np.zeros((rows, row_length + 1), np.uint8)
    ids_RS.reshape(-1)[to_N] = ids_N[from_N]
    flags_RS.reshape(-1)[to_N] = TARGET
    # The first token of a part is a target only if it is a BOS that follows another document in the row.
    is_bos_N = np.zeros(len(ids_N), bool)
    is_bos_N[starts_D] = True
    begins_P = is_bos_N[start_P]
    flags_RS[row_P, at_P] = START | (TARGET * (begins_P & ~first_P)).astype(np.uint8)

    filled_R = np.bincount(row_P, weights=length_P, minlength=rows).astype(np.int64)
    padded_R = np.flatnonzero(filled_R <= row_length)
    flags_RS[padded_R, filled_R[padded_R]] = START
    tokens = int(np.count_nonzero((within_N > 0) & ~is_bos_N[from_N]))
    document_P = np.searchsorted(starts_D, start_P, "right") - 1
    whole = int(np.count_nonzero(begins_P & (length_P >= lengths_D[document_P])))
    return Packed(
        ids_RS,
        flags_RS,
        tokens=tokens,
        discarded=int((lengths_D - 1).sum()) - tokens,
        padding=int((row_length + 1 - filled_R).sum()),
        cut=len(lengths_D) - whole,
    )
