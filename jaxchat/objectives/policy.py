"""Policy gradients: one surrogate loss over tokens, whose settings reproduce the published objectives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxchat.model.architecture import Model
from jaxchat.model.transformer import Params, Transformer
from jaxchat.objectives.advantages import Aggregate, Baseline
from jaxchat.objectives.logprobs import token_logprobs
from jaxchat.objectives.objective import Batch, Column, Objective, Sum

LARGEST_LOG_RATIO = 20.0  # The exponential of larger values could overflow; verl uses the same bound.


@dataclass(frozen=True)
class Policy:
    """Settings of a policy gradient: how to turn rewards into advantages, and an advantage A into a token's loss.

    Attributes:
        advantage: the baseline subtracted from rewards, see `advantages.group_advantages`.
        ratio: the factor of A. "none": the loss is -A log p. The others are importance ratios of the policy to the
            sampling policy: "token" p / old, "sequence" its geometric mean over the sequence's trained tokens (GSPO),
            "sequence_sum" the ratio of whole sequences (RLOO).
        clip_low, clip_high: the ratio r is clipped to 1 - clip_low .. 1 + clip_high, and the loss is
            -min(r A, clip(r) A) (PPO, arXiv 1707.06347); None for no bound.
        dual_clip: lower bound dual_clip * A of r A where A < 0 (arXiv 1912.09729); None for no bound.
        aggregate: how token losses are averaged, see `advantages.token_weights`.
        drop_equal_groups: replace prompts whose rewards are all equal by others (DAPO's dynamic sampling).
    """

    advantage: Baseline = "mean"
    ratio: Literal["none", "token", "sequence", "sequence_sum"] = "token"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    aggregate: Aggregate = "token_mean"
    drop_equal_groups: bool = False

    def __post_init__(self) -> None:
        bounds = {"clip_low": self.clip_low, "clip_high": self.clip_high, "dual_clip": self.dual_clip}
        for name, bound in bounds.items():
            if bound is not None and self.ratio == "none":
                raise ValueError(f"{name}={bound} has no effect with ratio=none: set {name} to None")
            if bound is not None and not bound > 0:
                raise ValueError(f"{name}={bound} must be positive")
        if self.dual_clip is not None and self.dual_clip <= 1 + (self.clip_high or 0):
            raise ValueError(f"dual_clip={self.dual_clip} must be above 1 + clip_high={self.clip_high}")
        if self.ratio == "sequence_sum" and self.aggregate != "sequence_mean":
            raise ValueError(f"ratio=sequence_sum requires aggregate=sequence_mean, not {self.aggregate}")


OBJECTIVES: Mapping[str, Policy] = {
    "reinforce": Policy("none", ratio="none", clip_low=None, clip_high=None),
    "reinforce_mean": Policy("mean", ratio="none", clip_low=None, clip_high=None),
    "rloo": Policy("leave_one_out", ratio="sequence_sum", aggregate="sequence_mean"),
    "grpo": Policy("standard", aggregate="sequence_mean"),
    "dr_grpo": Policy("mean", aggregate="constant"),
    "dapo": Policy("standard", clip_high=0.28, drop_equal_groups=True),
    "gspo": Policy("standard", ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregate="sequence_mean"),
    "ppo": Policy("mean", dual_clip=3.0),
}


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """The surrogate loss of `policy` on batches of sampled sequences.

    `temperature` is the sampler's; `truncated` tells whether it sampled from a part of the vocabulary. A batch also has
    the columns that `surrogate` reads and, if truncated, support (B, T, ceil(vocab / 8)) uint8: the tokens from which
    each target was sampled (see `logprobs.token_logprobs`). A sequence is one segment of a row; rows with several
    require a model that isolates documents.
    """

    policy: Policy
    temperature: float = 1.0
    truncated: bool = False
    ragged: ClassVar[bool] = True
    drops: ClassVar[bool] = False  # The model that is trained is the one that was sampled.

    def columns(self, model: Model, length: int) -> dict[str, Column]:
        columns = super().columns(model, length)
        columns |= {name: ((length,), jnp.float32) for name in ("norms", "advantages", "old_logprobs")}
        return columns | ({"support": ((length, -(-model.vocab // 8)), jnp.uint8)} if self.truncated else {})

    def loss(self, transformer: Transformer, params: Params, hidden_BTM: jax.Array, batch: Batch) -> Sum:
        distribution = self.distribution(transformer.config, batch)
        logprobs_BT = token_logprobs(hidden_BTM, transformer.head(params), batch["targets"], **distribution)
        return surrogate(self.policy, logprobs_BT, batch)

    def distribution(self, model: Model, batch: Batch) -> dict[str, Any]:
        """Arguments of `token_logprobs` for the distribution that the targets of a batch were sampled from."""
        sampler = {"temperature": self.temperature, "support_BTC": batch.get("support")}
        return {"vocab": model.vocab, "softcap": model.softcap, **sampler}


def surrogate(policy: Policy, logprobs_BT: jax.Array, batch: Mapping[str, jax.Array]) -> Sum:
    """Sums over trained tokens: weight * loss, and the share of the divisor (see `advantages.token_weights`).

    Columns, all (B, T): weights and norms (shares of the divisor), 0 where a target is not trained; advantages;
    old_logprobs, the targets' log-probabilities in nats under the parameters that sampled them, as computed by the
    trainer and not by the sampler, so that the first ratio is 1; segments, from 0 to T in a row. Values where weights
    are 0 are ignored.
    Statistics are means over trained tokens: the ratio (the token's for ratio="none"); the fraction of clipped tokens;
    and r - 1 - log r >= 0, which estimates KL(old || policy) in nats (Schulman's k3).
    """
    trained_BT = batch["weights"] > 0
    # Untrained targets may hold any value, and 0 * NaN is NaN.
    logprobs_BT = jnp.where(trained_BT, logprobs_BT, 0)
    gap_BT = logprobs_BT - jnp.where(trained_BT, batch["old_logprobs"], 0)
    advantages_BT = jnp.where(trained_BT, batch["advantages"], 0)
    log_ratio_BT = gap_BT
    if policy.ratio in SEQUENCE_RATIOS:
        total_BT, length_BT = (_by_sequence(x_BT, batch["segments"]) for x_BT in (gap_BT, trained_BT))
        log_ratio_BT = SEQUENCE_RATIOS[policy.ratio](total_BT, length_BT, gap_BT)
    ratio_BT = jnp.exp(jnp.clip(log_ratio_BT, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
    bound_BT = jnp.zeros_like(trained_BT)
    if policy.ratio == "none":
        loss_BT = -advantages_BT * logprobs_BT
    else:
        low = 0.0 if policy.clip_low is None else 1 - policy.clip_low
        high = None if policy.clip_high is None else 1 + policy.clip_high
        free_BT = -advantages_BT * ratio_BT
        clipped_BT = -advantages_BT * jnp.clip(ratio_BT, low, high)
        bound_BT = clipped_BT > free_BT
        loss_BT = jnp.maximum(free_BT, clipped_BT)
        if policy.dual_clip is not None:
            loss_BT = jnp.where(advantages_BT < 0, jnp.minimum(loss_BT, -advantages_BT * policy.dual_clip), loss_BT)
    small_BT = jnp.clip(jax.lax.stop_gradient(gap_BT), -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    values = {
        "ratio": jnp.where(trained_BT, jax.lax.stop_gradient(ratio_BT), 0),
        "clipped": bound_BT,
        "kl_old": jnp.expm1(small_BT) - small_BT,
    }
    tokens = jnp.sum(trained_BT, dtype=logprobs_BT.dtype)
    means = {name: (jnp.sum(value_BT, dtype=logprobs_BT.dtype), tokens) for name, value_BT in values.items()}
    return Sum(jnp.sum(batch["weights"] * loss_BT), jnp.sum(jnp.where(trained_BT, batch["norms"], 0)), means)


# Functions of a sequence's total log-ratio, its number of trained tokens, and a token's log-ratio, each (B, T): the log
# of the ratio in its token form, with the sequence's value and the token's gradient.
SEQUENCE_RATIOS: Mapping[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    # GSPO (arXiv 2507.18071, 4.3).
    "sequence": lambda total, length, gap: total / jnp.maximum(length, 1) + gap - jax.lax.stop_gradient(gap),
    # Its mean over tokens has the value and gradient of the ratio of whole sequences.
    "sequence_sum": lambda total, length, gap: total + length * (gap - jax.lax.stop_gradient(gap)),
}


def _by_sequence(x_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """For every token the sum over its segment, at least float32 (B, T); without gradient."""

    def of_row(x_T: jax.Array, segments_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(x_T, segments_T, num_segments=len(x_T) + 1)[segments_T]

    x_BT = jax.lax.stop_gradient(x_BT).astype(jnp.promote_types(x_BT.dtype, jnp.float32))
    return jax.vmap(of_row)(x_BT, segments_BT)
