"""Learning rates, momenta and weight decay from a budget: the optimizers of the families.

nanochat's formulas (July 2026): learning rates grow with the square root of the batch; weight decay keeps batch / (rate
* decay * horizon) constant (arXiv:2405.13698), relative to depth 12.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jaxchat.model import Model
from jaxchat.optimizer import AdamW, Muon, Optimizer

REFERENCE_BATCH = 2**19
REFERENCE_DECAY = 0.28
SMALL_BATCH = 2**18  # Tokens per step; nanochat's rule for the rates was not fitted below.
BATCH_EXPONENT = 0.1
STEPS_EXPONENT = 0.7


class Budget(NamedTuple):
    """What learning rates depend on. The last two count the parameters in matrices of the layers and in the head; July
    uses their ratio."""

    width: int
    batch_tokens: int
    scaling_parameters: int = 1
    reference_parameters: int = 1  # The same at depth 12.

    @property
    def by_width(self) -> float:
        """Factor of the learning rates of embedding tables and head: (width / 768)^-0.5."""
        return (self.width / 768) ** -0.5


@dataclass(frozen=True)
class Rates:
    """An optimizer for a budget, and its `scale` in the stages after pretraining; the defaults are nanochat's."""

    optimizer: Callable[[Budget], Optimizer]
    sft_scale: float = 0.8
    rl_scale: float = 0.05


def _july2026(budget: Budget) -> Optimizer:
    """nanochat's rates: proportional to sqrt(batch); those of tables and head also to 1 / sqrt(width)."""
    by_batch, by_width = math.sqrt(budget.batch_tokens / REFERENCE_BATCH), budget.by_width
    decay = REFERENCE_DECAY * by_batch * budget.reference_parameters / budget.scaling_parameters
    return Optimizer(
        muon=Muon(0.02 * by_batch, decay),
        head=AdamW(0.008 * by_width * by_batch, 0.8, 0.96, 0.01),
        embed=AdamW(0.3 * by_width * by_batch, 0.8, 0.995, 0.001),
        value_embeddings=AdamW(0.15 * by_width * by_batch, 0.8, 0.995, 0.01),
        resid_scale=AdamW(0.005 * by_batch, 0.8, 0.95, 0.05),
        x0_scale=AdamW(0.5 * by_batch, 0.96, 0.95),
        scalars=AdamW(0.2, 0.8, 0.95),
    )


def _november2026(budget: Budget) -> Optimizer:
    """July's rates at its reference batch, times sqrt(1/2) (batch / 2^18)^0.1 (2520 / steps)^0.7.

    The law is fitted on the runs of docs/small_models.md and replaces nanochat's sqrt(batch / 2^19) below 2^18 tokens
    per step; the two agree at 2^18 tokens and 2,520 steps. With more than a tenth of July's rate for x0_scale or a
    fortieth for scalars the loss can jump. Lower momentum and b1 average gradients over fewer steps. The optimizer
    applies the steps' factor itself, so that a run can be extended. Later stages set `scale` instead.
    """
    if budget.batch_tokens >= SMALL_BATCH:
        return _july2026(budget)
    base = _july2026(budget._replace(batch_tokens=REFERENCE_BATCH))
    return dataclasses.replace(
        base,
        muon=Muon(0.02, 0.2, momentum=0.90, momentum_warmup=50),
        **{name: dataclasses.replace(getattr(base, name), b1=0.6) for name in ("head", "embed", "value_embeddings")},
        x0_scale=AdamW(0.05, 0.96, 0.95),
        scalars=AdamW(0.005, 0.8, 0.95),
        warmup_steps=10,
        scale=math.sqrt(SMALL_BATCH / REFERENCE_BATCH) * (budget.batch_tokens / SMALL_BATCH) ** BATCH_EXPONENT,
        steps_exponent=STEPS_EXPONENT,
    )


def _october2025(budget: Budget) -> Optimizer:
    table = AdamW(0.2 * budget.by_width, 0.8, 0.95)
    plain = AdamW(0.005)
    return Optimizer(
        muon=Muon(0.02, 0.0, 0.85, 0.95, 0.95, 300, 0.9, False, False, False, False),
        head=AdamW(0.004 * budget.by_width, 0.8, 0.95),
        embed=table,
        value_embeddings=table,
        resid_scale=plain,
        x0_scale=plain,
        scalars=plain,
        warmup_steps=0,
        warmdown_fraction=0.2,
        final_fraction=0.0,
        clip=1.0,
    )


def fitted(base: Optimizer, model: Model) -> Optimizer:
    """The optimizer of the depth's default for the architecture of another family.

    Gains and biases get the rate of nanochat's factors of the residual stream, which are numbers around 1 as gains are:
    its rate of scalars, 0.2 in July, is for two numbers and would double a gain in five steps. They do not decay.
    Without a softcap, which bounds what a step does to the logits, the head gets a tenth of its rate, which is about
    GPT-2's at depth 12. A tied embedding has the head's.
    """
    gains = dataclasses.replace(base.resid_scale, weight_decay=0.0)
    slow = dataclasses.replace(base.head, learning_rate=base.head.learning_rate / 10)
    head = slow if model.softcap is None else base.head
    return dataclasses.replace(base, scalars=gains, head=head, embed=head if model.tied else base.embed)


JULY2026 = Rates(_july2026)
NOVEMBER2026 = Rates(_november2026, sft_scale=0.25, rl_scale=0.125)
OCTOBER2025 = Rates(_october2025)
