"""Documents into rows of one length, by three rules.

A document is the sequence BOS t1 .. tn. A BOS that starts a document after the end of another in the same row is
trained on, as the end of the one before.

    best_fit     A document longer than a row is cut into pieces that overlap by one token; the first token of a
                 continuation is input only, so every token is a target exactly once and none is lost. The pieces
                 that do not fill a row are packed best-fit-decreasing; what stays free is padding.
    concatenate  One long stream of documents, cut at every row's border with the same overlap. No padding but in the
                 last row; nearly every row starts in the middle of a document.
    crop         nanochat's loader: the longest buffered document that fits, again and again; when none fits, the
                 shortest is cropped to fill the row and its rest is thrown away.

Conversations are packed by a rule of their own, `pack_whole`: best fit, none is cut, and one longer than a row is left
out.

Shapes: N all tokens, D documents, P pieces, R rows, S ids of a row (row_length + 1).
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
    """Rows, and what became of the documents; tokens are counted without BOS, padding in ids."""

    ids_RS: np.ndarray
    flags_RS: np.ndarray
    tokens: int
    discarded: int
    padding: int
    cut: int  # documents that do not lie whole in one row
    too_long: int = 0  # conversations that are left out


class Pieces(NamedTuple):
    """Slices of the token stream and where they go; `row` rises, and pieces of a row stand in their order."""

    start_P: np.ndarray
    length_P: np.ndarray
    row_P: np.ndarray


def pack(documents: Sequence[np.ndarray], row_length: int, rule: Rule, *, bos: int, dtype: np.dtype) -> Packed:
    """Packs documents, each given without its BOS, into rows of row_length + 1 ids."""
    lengths_D = np.array([len(document) + 1 for document in documents if len(document)], np.int64)
    starts_D = np.cumsum(lengths_D) - lengths_D
    ids_N = np.full(int(lengths_D.sum()), bos, dtype)
    for start, document in zip(starts_D.tolist(), (document for document in documents if len(document)), strict=True):
        ids_N[start + 1 : start + 1 + len(document)] = document
    pieces = RULES[rule](starts_D, lengths_D, row_length)
    return _lay_out(ids_N, starts_D, lengths_D, pieces, row_length=row_length, bos=bos)


def pack_whole(
    conversations: Sequence[tuple[Sequence[int], Sequence[bool]]], row_length: int, *, bos: int, dtype: np.dtype
) -> Packed:
    """Packs conversations, each its ids from BOS on and whether each is learned, into rows of row_length + 1 ids.

    A conversation is one segment of one row, or, if it has more than row_length + 1 ids, left out. Its first id is
    never learned, so each needs a later one that is, and then every row has one.
    """
    fitting = [(ids, learned) for ids, learned in conversations if len(ids) <= row_length + 1]
    row_C = best_fit([len(ids) for ids, _ in fitting], row_length + 1)
    rows = int(row_C.max()) + 1 if fitting else 0
    ids_RS = np.full((rows, row_length + 1), bos, dtype)
    flags_RS = np.zeros((rows, row_length + 1), np.uint8)
    filled_R = [0] * rows
    for row, (ids, learned) in zip(row_C.tolist(), fitting):
        start, stop = filled_R[row], filled_R[row] + len(ids)
        ids_RS[row, start:stop] = ids
        flags_RS[row, start:stop] = np.where(learned, TARGET, 0)
        flags_RS[row, start] = START
        filled_R[row] = stop
    for row, filled in enumerate(filled_R):
        if filled <= row_length:
            flags_RS[row, filled] = START
    kept = sum(len(ids) - 1 for ids, _ in fitting)
    return Packed(
        ids_RS,
        flags_RS,
        tokens=kept,
        discarded=sum(len(ids) - 1 for ids, _ in conversations) - kept,
        padding=rows * (row_length + 1) - sum(filled_R),
        cut=0,
        too_long=len(conversations) - len(fitting),
    )


def best_fit(lengths: Sequence[int], capacity: int) -> np.ndarray:
    """The row of each length, in any order: longest first, each goes to the fullest row that it fits in, or a new one.

    Rows are numbered from 0, hold at most `capacity` each, and none is empty.
    """
    lengths_C = np.asarray(lengths, np.int64)
    if len(lengths_C) and not 1 <= lengths_C.min() <= lengths_C.max() <= capacity:
        raise ValueError(f"lengths from {lengths_C.min()} to {lengths_C.max()} must lie between 1 and {capacity}")
    order_C = np.argsort(-lengths_C, kind="stable")
    row_C = np.empty(len(lengths_C), np.int64)
    row_C[order_C] = _best_fit_decreasing(lengths_C[order_C].tolist(), capacity)
    return row_C


def _best_fit(starts_D: np.ndarray, lengths_D: np.ndarray, row_length: int) -> Pieces:
    full_D = (lengths_D - 1) // row_length
    rest_D = lengths_D - full_D * row_length
    full_rows = int(full_D.sum())
    # The j-th full row of its document starts j * row_length after the document does: one token of overlap.
    ordinal_R = np.arange(full_rows) - np.repeat(np.cumsum(full_D) - full_D, full_D)
    full_start_R = np.repeat(starts_D, full_D) + ordinal_R * row_length
    open_D = np.flatnonzero(rest_D > 1)
    order_P = open_D[np.argsort(-rest_D[open_D], kind="stable")]
    row_P = full_rows + _best_fit_decreasing(rest_D[order_P].tolist(), row_length + 1)
    by_row_P = np.argsort(row_P, kind="stable")
    order_P, row_P = order_P[by_row_P], row_P[by_row_P]
    return Pieces(
        np.concatenate([full_start_R, starts_D[order_P] + full_D[order_P] * row_length]),
        np.concatenate([np.full(full_rows, row_length + 1), rest_D[order_P]]),
        np.concatenate([np.arange(full_rows), row_P]),
    )


def _best_fit_decreasing(lengths: list[int], capacity: int) -> np.ndarray:
    """The row of each length: the fullest row it fits in, or a new one. Lengths come in falling order."""
    rows_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set while some row has s ids free; finding the tightest row is one shift and one lowest bit
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


def _concatenate(starts_D: np.ndarray, lengths_D: np.ndarray, row_length: int) -> Pieces:
    total = int(lengths_D.sum())
    borders = np.arange(0, total - 1, row_length)
    start_P = np.union1d(borders, starts_D).astype(np.int64)
    stop_P = np.append(start_P[1:], total)[: len(start_P)]
    # The row before a border also holds the border's id, as its last target.
    stop_P[:-1] += np.isin(start_P[1:], borders)
    return Pieces(start_P, stop_P - start_P, start_P // row_length)


def _crop(starts_D: np.ndarray, lengths_D: np.ndarray, row_length: int) -> Pieces:
    lengths, starts = lengths_D.tolist(), starts_D.tolist()
    waiting: dict[int, deque[int]] = {}
    known: list[int] = []  # the lengths in `waiting`, in order
    pieces: list[tuple[int, int, int]] = []
    buffered = taken = row = 0

    def take(length: int) -> int:
        queue = waiting[length]
        document = queue.popleft()
        if not queue:
            del waiting[length]
            known.pop(bisect.bisect_left(known, length))
        return document

    while buffered or taken < len(lengths):
        space = row_length + 1
        while space:
            while buffered < CROP_BUFFER and taken < len(lengths):
                if lengths[taken] not in waiting:
                    waiting[lengths[taken]] = deque()
                    bisect.insort(known, lengths[taken])
                waiting[lengths[taken]].append(taken)
                buffered, taken = buffered + 1, taken + 1
            if not buffered:
                break
            fit = bisect.bisect_right(known, space)
            length = known[fit - 1] if fit else known[0]
            pieces.append((starts[take(length)], min(length, space), row))
            buffered -= 1
            space -= pieces[-1][1]
        row += 1
    return Pieces(*np.array(pieces, np.int64).reshape(-1, 3).T)


RULES: dict[str, Callable[[np.ndarray, np.ndarray, int], Pieces]] = {
    "best_fit": _best_fit,
    "concatenate": _concatenate,
    "crop": _crop,
}


def _lay_out(
    ids_N: np.ndarray, starts_D: np.ndarray, lengths_D: np.ndarray, pieces: Pieces, *, row_length: int, bos: int
) -> Packed:
    start_P, length_P, row_P = pieces
    rows = int(row_P[-1]) + 1 if len(row_P) else 0
    before_P = np.cumsum(length_P) - length_P
    first_P = np.diff(row_P, prepend=-1) > 0
    # Where a piece stands in its row: the ids before it, less those before its row's first piece.
    at_P = before_P - np.repeat(before_P[first_P], np.bincount(row_P, minlength=rows))
    within_N = np.arange(int(length_P.sum())) - np.repeat(before_P, length_P)
    from_N = np.repeat(start_P, length_P) + within_N
    to_N = np.repeat(row_P * (row_length + 1) + at_P, length_P) + within_N

    ids_RS = np.full((rows, row_length + 1), bos, ids_N.dtype)
    flags_RS = np.zeros((rows, row_length + 1), np.uint8)
    ids_RS.reshape(-1)[to_N] = ids_N[from_N]
    flags_RS.reshape(-1)[to_N] = TARGET
    # A piece's first token is a target only where it is a BOS that ends the document before it in the row.
    is_bos_N = np.zeros(len(ids_N), bool)
    is_bos_N[starts_D] = True
    begins_P = is_bos_N[start_P]
    flags_RS[row_P, at_P] = START | (TARGET * (begins_P & ~first_P)).astype(np.uint8)

    filled_R = np.bincount(row_P, weights=length_P, minlength=rows).astype(np.int64)
    padded_R = np.flatnonzero(filled_R <= row_length)
    flags_RS[padded_R, filled_R[padded_R]] = START
    kept = int(np.count_nonzero((within_N > 0) & ~is_bos_N[from_N]))
    document_P = np.searchsorted(starts_D, start_P, "right") - 1
    whole = int(np.count_nonzero(begins_P & (length_P >= lengths_D[document_P])))
    return Packed(
        ids_RS,
        flags_RS,
        tokens=kept,
        discarded=int((lengths_D - 1).sum()) - kept,
        padding=int((row_length + 1 - filled_R).sum()),
        cut=len(lengths_D) - whole,
    )
