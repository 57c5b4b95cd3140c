"""Converts sampled answers to training batches: arrays over positions, packed into rows, cut into micro-batches.

R rows, T positions of a row or of one answer, C = ceil(vocab / 8) bytes of a bit set of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxchat.data.packing import best_fit
from jaxchat.decode.requests import Completion

Columns = dict[str, np.ndarray]


@dataclass
class Answer:
    """A prompt with one sampled answer, as arrays (T,) over all positions that have a next token.

    Attributes:
        trained_T: loss mask: true where the target was sampled, stop token included; not for prompt and tool output.
        sampled_logprobs_T: log-probabilities under the sampling distribution, in nats.
        support_TC: tokens that the target was sampled from, one bit per token; None without truncation.
        logprobs_T: log-probabilities by the trainer under the parameters that sampled; the base of policy ratios.
        weight, norm: see `advantages.token_weights`.
    """

    tokens_T: np.ndarray
    targets_T: np.ndarray
    trained_T: np.ndarray
    sampled_logprobs_T: np.ndarray
    support_TC: np.ndarray | None
    advantages_T: np.ndarray
    logprobs_T: np.ndarray
    weight: float = 0.0
    norm: float = 0.0


def answer_of(prompt: Sequence[int], completion: Completion, *, set_bytes: int) -> Answer:
    """Converts a completion to an `Answer` that is not scored yet; `set_bytes` is C, or 0 without truncation."""
    ids = np.array([*prompt, *completion.tokens], np.int32)
    first, T = len(prompt) - 1, len(ids) - 1
    trained_T, sampled_T = np.zeros(T, bool), np.zeros(T, np.float32)
    trained_T[first:], sampled_T[first:] = completion.sampled, completion.sampling_logprobs
    support_TC = None
    if set_bytes:
        support_TC = np.full((T, set_bytes), 255, np.uint8)
        if completion.support is not None and len(completion.tokens):
            support_TC[first:] = completion.support
    zero_T = np.zeros(T, np.float32)
    return Answer(ids[:-1], ids[1:], trained_T, sampled_T, support_TC, zero_T, zero_T)


def lay_out(
    answers: Sequence[Answer], *, row_length: int, micro_rows: int, share_rows: bool, set_bytes: int
) -> tuple[Columns, list[tuple[int, int]]]:
    """Places answers in rows; returns columns (R, T), and the row and position where each answer begins.

    R is a multiple of `micro_rows`. With `share_rows` several answers may share a row, each as its own segment.
    """
    lengths = [len(answer.tokens_T) for answer in answers]
    row_N = best_fit(lengths, row_length) if share_rows else np.arange(len(answers))
    rows = -(-(int(max(row_N, default=0)) + 1) // micro_rows) * micro_rows
    columns = {name: np.zeros((rows, row_length), np.int32) for name in ("tokens", "targets", "segments")}
    more = ("weights", "norms", "advantages", "old_logprobs", "sampled", "trained")
    columns |= {name: np.zeros((rows, row_length), np.float32) for name in more}
    if set_bytes:
        columns["support"] = np.full((rows, row_length, set_bytes), 255, np.uint8)
    filled, places = np.zeros(rows, int), []
    for row, answer, length in zip(row_N.tolist(), answers, lengths):
        at = int(filled[row])
        span = slice(at, at + length)
        columns["segments"][row, at:] += 1
        for name, values in (
            ("tokens", answer.tokens_T),
            ("targets", answer.targets_T),
            ("weights", answer.weight * answer.trained_T),
            ("norms", answer.norm * answer.trained_T),
            ("advantages", answer.advantages_T),
            ("old_logprobs", answer.logprobs_T),
            ("sampled", answer.sampled_logprobs_T),
            ("trained", answer.trained_T),
            ("support", answer.support_TC),
        ):
            if values is not None:
                columns[name][row, span] = values
        filled[row] += length
        places.append((row, at))
    for row, end in enumerate(filled):  # The padding of a row is its own segment.
        columns["segments"][row, end:] += 1
    return columns, places


def micro_batches(columns: Columns, *, micro_rows: int, most: int) -> tuple[Columns, int]:
    """Cuts columns into micro-batches, (micro-batches, rows, T); returns them and the number that is not empty.

    The result is padded to `most` micro-batches, enough for the worst case, so that the step is compiled once.
    """
    used = len(columns["tokens"]) // micro_rows
    cut: Columns = {}
    for name in ("tokens", "targets", "segments", "weights", "norms", "advantages", "old_logprobs", "support"):
        if name in columns:
            column = columns[name].reshape(used, micro_rows, *columns[name].shape[1:])
            cut[name] = np.concatenate([column, np.zeros((most - used, *column.shape[1:]), column.dtype)])
    return cut, used
