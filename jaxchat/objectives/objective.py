"""The interface of objectives: configurations that map a model, parameters and a batch to a loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxchat.model.part import Weighted
from jaxchat.model.transformer import Forward, Model, Params, Transformer

Column = tuple[tuple[int, ...], Any]  # Shape after the axes (micro-batches, rows), and type.
Batch = Mapping[str, jax.Array]


class Sum(NamedTuple):
    """A weighted total and its weight; the training step divides once, at the end.

    `statistics` are further pairs of a total and a weight, which are only logged.
    """

    total: jax.Array
    weight: jax.Array
    statistics: Mapping[str, Weighted] = {}


class Objective(Protocol):
    """A loss. If `ragged`, a batch may end with empty micro-batches; its entry `count` is the number of others."""

    @property
    def ragged(self) -> bool: ...

    def columns(self, model: Model, length: int) -> Mapping[str, Column]:
        """The columns of a batch of rows of `length` tokens."""

    def __call__(self, transformer: Transformer, params: Params, batch: Batch, key: jax.Array | None = None) -> Sum:
        """The total and weight of a micro-batch; `key` is its random key."""


def row_columns(length: int) -> dict[str, Column]:
    """The columns of every batch: tokens, targets, segments, and the weights of the targets."""
    columns: dict[str, Column] = {name: ((length,), jnp.int32) for name in ("tokens", "targets", "segments")}
    return columns | {"weights": ((length,), jnp.float32)}


def with_losses(own: Sum, forward: Forward) -> Sum:
    """Adds the mean of each loss that the model's parts return to an objective's sum, and all to its statistics."""
    total = own.total
    for value, weight in forward.losses.values():
        total = total + own.weight * value / jnp.maximum(weight, 1e-9)
    return Sum(total, own.weight, {**own.statistics, **forward.losses, **forward.statistics})
