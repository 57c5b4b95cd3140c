"""Bits per byte of held-out text, a loss that is comparable between tokenizers."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import sharding
from jaxchat.data import streams
from jaxchat.data.streams import Rows
from jaxchat.model.transformer import Transformer
from jaxchat.objectives.logprobs import weighted_nll


class BitsPerByte:
    """Loss on held-out rows in nats, divided by ln 2 times the bytes of the targets. Special tokens are excluded."""

    def __init__(
        self,
        transformer: Transformer,
        mesh: jax.sharding.Mesh,
        *,
        rows: Sequence[Rows],
        bytes_per_token: np.ndarray,
        batch_rows: int,
    ) -> None:
        self._mesh, self._rows, self._batch_rows = mesh, rows, batch_rows
        self._bytes = jax.device_put(jnp.asarray(bytes_per_token, jnp.float32), sharding.replicated(mesh))
        c = transformer.config

        def score(params: Any, batch: Any, bytes_V: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden_BTM = transformer.apply(params, batch["tokens"], segments_BT=batch["segments"]).hidden
            bytes_BT = bytes_V[batch["targets"]] * batch["weights"]
            counted_BT = (bytes_BT > 0).astype(jnp.float32)
            nats = weighted_nll(
                hidden_BTM, transformer.head(params), batch["targets"], counted_BT, vocab=c.vocab, softcap=c.softcap
            )
            return nats, bytes_BT.sum()

        self._score = jax.jit(score)
        self.rows_in_all = sum(map(len, rows))

    def __call__(self, params: Any, limit: int) -> float:
        """Bits per byte of `limit` rows, spread evenly over all held-out rows."""
        nats = length = 0.0
        own = sharding.own_rows(self._mesh, self._batch_rows)
        for batch in streams.every_row_once(self._rows, self._batch_rows, places=own, limit=limit):
            placed = sharding.put_batch(self._mesh, {name: column[None] for name, column in batch.items()})
            one = {name: column[0] for name, column in placed.items()}
            nats_here, bytes_here = self._score(params, one, self._bytes)
            nats, length = nats + float(nats_here), length + float(bytes_here)
        return nats / (math.log(2) * max(length, 1.0))
