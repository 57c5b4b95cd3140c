"""The format of a row on disk and of a batch in memory.

A row of row_length T holds T + 1 token ids, then T + 1 flag bytes, so that each of its T positions has a target.
Shapes: R rows, B rows of a batch, T positions, S = T + 1 ids of a row on disk.
"""

from collections.abc import Sequence

import numpy as np

from jaxchat.errors import UserError

START = 1  # flag: first token of a segment
TARGET = 2  # flag: training target of the position before it

Batch = dict[str, np.ndarray]
"""tokens, targets, segments: int32 (B, T); weights: float32 (B, T). Later stages add columns."""


def token_dtype(vocab: int) -> np.dtype:
    """Dtype of token ids on disk."""
    return np.dtype(np.uint16 if vocab <= 65536 else np.uint32)


def encode_row(ids_S: np.ndarray, flags_S: np.ndarray, dtype: np.dtype) -> bytes:
    """A row as it is stored: its ids of type `dtype`, then its flags."""
    return ids_S.astype(dtype, copy=False).tobytes() + flags_S.astype(np.uint8, copy=False).tobytes()


def decode_rows(records: Sequence[bytes], row_length: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (R, S) of type `dtype` and flags uint8 (R, S). Raises `UserError` if a record has the wrong size."""
    id_bytes = (row_length + 1) * dtype.itemsize
    size = id_bytes + row_length + 1
    for record in records:
        if len(record) != size:
            raise UserError(
                f"a row has {len(record)} bytes, but row_length={row_length} needs {size}; "
                "delete its directory in the cache and prepare it again"
            )
    bytes_RN = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), size)
    return np.ascontiguousarray(bytes_RN[:, :id_bytes]).view(dtype), bytes_RN[:, id_bytes:]


def batch_of(ids_BS: np.ndarray, flags_BS: np.ndarray) -> Batch:
    """Shifts rows into inputs and targets; the segment of a position is the number of START flags up to it."""
    return {
        "tokens": ids_BS[:, :-1].astype(np.int32),
        "targets": ids_BS[:, 1:].astype(np.int32),
        "weights": ((flags_BS[:, 1:] & TARGET) > 0).astype(np.float32),
        "segments": np.cumsum(flags_BS[:, :-1] & START, axis=1, dtype=np.int32),
    }
