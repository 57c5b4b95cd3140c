"""Held-out loss of conversations, averaged over the tokens of the loss mask."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from jaxchat import sharding
from jaxchat.data import streams
from jaxchat.data.streams import Rows
from jaxchat.model.transformer import Transformer
from jaxchat.objectives.likelihood import Likelihood


class HeldOutLoss:
    """Mean loss in nats per trained token over all held-out rows."""

    def __init__(
        self, transformer: Transformer, mesh: jax.sharding.Mesh, *, rows: Sequence[Rows], batch_rows: int
    ) -> None:
        self._mesh, self._rows, self._batch_rows = mesh, rows, batch_rows
        self._sum = jax.jit(functools.partial(Likelihood(), transformer))

    def __call__(self, params: Any) -> float:
        total = weight = 0.0
        own = sharding.own_rows(self._mesh, self._batch_rows)
        for batch in streams.every_row_once(self._rows, self._batch_rows, places=own):
            placed = sharding.put_batch(self._mesh, {name: column[None] for name, column in batch.items()})
            loss = self._sum(params, {name: column[0] for name, column in placed.items()})
            total, weight = total + float(loss.total), weight + float(loss.weight)
        return total / max(weight, 1.0)
