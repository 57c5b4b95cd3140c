"""Objectives: configurations that map a model, parameters and a batch to a loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxchat.model.architecture import Model
from jaxchat.model.part import Weighted
from jaxchat.model.transformer import Params, Transformer

Column = tuple[tuple[int, ...], Any]  # Shape after the axes (micro-batches, rows), and type.
Batch = Mapping[str, jax.Array]


class Sum(NamedTuple):
    """A weighted total and its weight; the training step divides once, at the end.

    `statistics` are further pairs of a total and a weight, which are only logged.
    """

    total: jax.Array
    weight: jax.Array
    statistics: Mapping[str, Weighted] = {}


@dataclass(frozen=True)
class Objective:
    """A loss. If `ragged`, a batch may end with empty micro-batches; its entry `count` is the number of others.

    `drops`: the model's parts get their random key, so that dropout takes place.
    """

    ragged: ClassVar[bool] = False
    drops: ClassVar[bool] = True

    def columns(self, model: Model, length: int) -> dict[str, Column]:
        """The columns of a batch of rows of `length` tokens: tokens, targets, segments, and weights of the targets."""
        columns: dict[str, Column] = {name: ((length,), jnp.int32) for name in ("tokens", "targets", "segments")}
        return columns | {"weights": ((length,), jnp.float32)}

    def loss(self, transformer: Transformer, params: Params, hidden_BTM: jax.Array, batch: Batch) -> Sum:
        """The total and weight of a micro-batch, given the final hidden states of its tokens."""
        raise NotImplementedError

    def __call__(self, transformer: Transformer, params: Params, batch: Batch, key: jax.Array | None = None) -> Sum:
        """Adds the mean of each loss that the model's parts return to `loss`; `key` is the random key of the model."""
        key = key if self.drops else None
        forward = transformer.apply(params, batch["tokens"], segments_BT=batch["segments"], key=key)
        total, weight, statistics = self.loss(transformer, params, forward.hidden, batch)
        for part_total, part_weight in forward.losses.values():
            total = total + weight * part_total / jnp.maximum(part_weight, 1e-9)
        return Sum(total, weight, {**statistics, **forward.losses, **forward.statistics})
