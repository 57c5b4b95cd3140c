"""Likelihood of held-out rows: bits per byte, a loss that is comparable between tokenizers, or nats per token."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import sharding, signals
from jaxchat.data import streams
from jaxchat.data.streams import Rows
from jaxchat.errors import UserError
from jaxchat.model.transformer import Transformer
from jaxchat.objectives.logprobs import weighted_nll


class HeldOut:
    """Mean negative log-likelihood of the targets of held-out rows, in nats per token of the loss mask.

    With `bytes_per_token` (V,) it is in bits per byte, and special tokens, which have no bytes, are excluded.
    """

    def __init__(
        self,
        transformer: Transformer,
        mesh: jax.sharding.Mesh,
        *,
        rows: Sequence[Rows],
        batch_rows: int,
        bytes_per_token: np.ndarray | None = None,
    ) -> None:
        self._mesh, self._rows, self._batch_rows = mesh, rows, batch_rows
        c = transformer.config
        self._nats = 1.0 if bytes_per_token is None else math.log(2)  # Nats of one unit of the result.
        sizes_V = np.ones(c.vocab) if bytes_per_token is None else bytes_per_token
        self._sizes_V = jax.device_put(jnp.asarray(sizes_V, jnp.float32), sharding.replicated(mesh))

        def score(params: Any, batch: Any, sizes_V: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden_BTM = transformer.apply(params, batch["tokens"], segments_BT=batch["segments"]).hidden
            sizes_BT = sizes_V[batch["targets"]] * batch["weights"]
            counted_BT = (sizes_BT > 0).astype(jnp.float32)
            nats = weighted_nll(
                hidden_BTM, transformer.head(params), batch["targets"], counted_BT, vocab=c.vocab, softcap=c.softcap
            )
            return nats, sizes_BT.sum()

        self._score = jax.jit(score)
        self.rows_in_all = sum(map(len, rows))

    def __call__(self, params: Any, limit: int | None = None) -> float:
        """The likelihood of all rows, or of `limit` rows spread evenly over them.

        Raises:
            UserError: no target counts.
        """
        nats = size = 0.0
        own = sharding.own_rows(self._mesh, self._batch_rows)
        for batch in streams.every_row_once(self._rows, self._batch_rows, places=own, limit=limit):
            signals.check()
            placed = sharding.put_batch(self._mesh, {name: column[None] for name, column in batch.items()})
            one = {name: column[0] for name, column in placed.items()}
            nats_here, size_here = self._score(params, one, self._sizes_V)
            nats, size = nats + float(nats_here), size + float(size_here)
        if not size:
            raise UserError("the held-out rows have no text to score: name other --data.val")
        return nats / (self._nats * size)
