"""Maximum likelihood: the objective of pretraining and SFT, which differ only in the weights of the targets."""

import jax

from jaxchat.model.transformer import Params, Transformer
from jaxchat.objectives.logprobs import weighted_nll
from jaxchat.objectives.objective import Batch, Objective, Sum


class Likelihood(Objective):
    """The weighted negative log-likelihood of a batch's targets, in nats."""

    def loss(self, transformer: Transformer, params: Params, hidden_BTM: jax.Array, batch: Batch) -> Sum:
        c, head_MV, weights_BT = transformer.config, transformer.head(params), batch["weights"]
        total = weighted_nll(hidden_BTM, head_MV, batch["targets"], weights_BT, vocab=c.vocab, softcap=c.softcap)
        return Sum(total, weights_BT.sum())
