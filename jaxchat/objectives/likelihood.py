"""Maximum likelihood: the objective of pretraining and SFT, which differ only in the weights of the targets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax

from jaxchat.model.transformer import Model, Params, Transformer
from jaxchat.objectives.logprobs import weighted_nll
from jaxchat.objectives.objective import Batch, Column, Sum, row_columns, with_losses


@dataclass(frozen=True)
class Likelihood:
    """The weighted negative log-likelihood of a batch's targets, in nats."""

    ragged: ClassVar[bool] = False

    def columns(self, model: Model, length: int) -> Mapping[str, Column]:
        return row_columns(length)

    def __call__(self, transformer: Transformer, params: Params, batch: Batch, key: jax.Array | None = None) -> Sum:
        c = transformer.config
        forward = transformer.apply(params, batch["tokens"], segments_BT=batch["segments"], key=key)
        total = weighted_nll(
            forward.hidden,
            transformer.head(params),
            batch["targets"],
            batch["weights"],
            vocab=c.vocab,
            softcap=c.softcap,
        )
        return with_losses(Sum(total, batch["weights"].sum()), forward)
