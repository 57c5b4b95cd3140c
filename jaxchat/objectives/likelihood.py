"""Maximum likelihood: the objective of pretraining and SFT, which differ in their weights alone."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from jaxchat.model.transformer import Params, Transformer
from jaxchat.objectives.logprobs import weighted_nll


class Sum(NamedTuple):
    """A weighted total and its weight; whoever wants the mean divides once, at the end.

    `extras` are further sums that are only logged, each divided by the sum named "tokens".
    """

    total: jax.Array
    weight: jax.Array
    extras: Mapping[str, jax.Array] = {}


Objective = Callable[[Params, Mapping[str, jax.Array]], Sum]


def likelihood(transformer: Transformer) -> Objective:
    """The weighted negative log-likelihood of a batch's targets, in nats."""
    c = transformer.config

    def objective(params: Params, batch: Mapping[str, jax.Array]) -> Sum:
        hidden_BTM, _ = transformer.apply(params, batch["tokens"], segments_BT=batch["segments"])
        total = weighted_nll(
            hidden_BTM,
            transformer.head(params),
            batch["targets"],
            batch["weights"],
            vocab=c.vocab,
            softcap=c.softcap,
        )
        return Sum(total, batch["weights"].sum())

    return objective
