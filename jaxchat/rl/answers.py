"""Converts sampled answers to training batches: arrays over positions, packed into rows, cut into micro-batches.

R rows, T positions of a row or of one answer, C = ceil(vocab / 8) bytes of a bit set of tokens.
"""

from collections.abc import Sequence

import numpy as np

from jaxchat.data.packing import best_fit
from jaxchat.decode.requests import Completion

Columns = dict[str, np.ndarray]


def answer_of(prompt: Sequence[int], completion: Completion, *, set_bytes: int) -> Columns:
    """Columns (T,) of a prompt with one sampled answer, over all positions that have a next token.

    trained: loss mask, 1 where the target was sampled, stop token included; 0 for prompt and tool output. sampled:
    log-probabilities under the sampling distribution, in nats. support (T, C): the tokens that the target was sampled
    from, one bit per token; only if `set_bytes`, which is C, is not 0. old_logprobs: log-probabilities by the trainer
    under the parameters that sampled, the base of policy ratios. These, advantages, weights and norms (see
    `advantages.token_weights`) are 0 until the answer is scored.
    """
    ids = np.array([*prompt, *completion.tokens], np.int32)
    first, T = len(prompt) - 1, len(ids) - 1
    answer = {"tokens": ids[:-1], "targets": ids[1:]}
    names = ("weights", "norms", "advantages", "old_logprobs", "sampled", "trained")
    answer |= {name: np.zeros(T, np.float32) for name in names}
    answer["trained"][first:], answer["sampled"][first:] = completion.sampled, completion.sampling_logprobs
    if set_bytes:
        answer["support"] = np.full((T, set_bytes), 255, np.uint8)
        if completion.support is not None and len(completion.tokens):
            answer["support"][first:] = completion.support
    return answer


def lay_out(
    answers: Sequence[Columns], *, row_length: int, micro_rows: int, share_rows: bool
) -> tuple[Columns, list[tuple[int, slice]]]:
    """Places answers in rows; returns columns (R, T), and the row and the positions of each answer.

    R is a multiple of `micro_rows`. With `share_rows` several answers may share a row, each as its own segment.
    """
    lengths = [len(answer["tokens"]) for answer in answers]
    row_N = best_fit(lengths, row_length) if share_rows else np.arange(len(answers))
    rows = -(-(int(row_N.max()) + 1) // micro_rows) * micro_rows
    columns = {"segments": np.zeros((rows, row_length), np.int32)}
    for name, like in answers[0].items():
        padding = 255 if name == "support" else 0
        columns[name] = np.full((rows, row_length, *like.shape[1:]), padding, like.dtype)
    filled, places = np.zeros(rows, int), []
    for row, answer, length in zip(row_N.tolist(), answers, lengths):
        at = int(filled[row])
        span = slice(at, at + length)
        columns["segments"][row, at:] += 1
        for name, values in answer.items():
            columns[name][row, span] = values
        filled[row] += length
        places.append((row, span))
    for row, end in enumerate(filled):  # The padding of a row is its own segment.
        columns["segments"][row, end:] += 1
    return columns, places


def micro_batches(columns: Columns, *, micro_rows: int, most: int) -> tuple[Columns, int]:
    """Cuts columns into micro-batches, (micro-batches, rows, T); returns them and the number that is not empty.

    The result is padded to `most` micro-batches, enough for the worst case, so that the step is compiled once.
    """
    used = len(columns["tokens"]) // micro_rows
    cut: Columns = {}
    for name, whole in columns.items():
        if name not in ("sampled", "trained"):  # These are not part of a training batch.
            column = whole.reshape(used, micro_rows, *whole.shape[1:])
            cut[name] = np.concatenate([column, np.zeros((most - used, *column.shape[1:]), column.dtype)])
    return cut, used
