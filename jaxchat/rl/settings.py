"""Settings of reinforcement learning."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from jaxchat.decode.sampling import LARGEST, SamplingParams, Truncation
from jaxchat.objectives.advantages import Aggregate, Baseline
from jaxchat.objectives.policy import OBJECTIVES, Policy
from jaxchat.tasks.rewards import REWARDS

if TYPE_CHECKING:
    Objective = str
else:
    Objective = Literal[tuple(OBJECTIVES)]


@dataclass(frozen=True)
class RL(Truncation):
    """Reinforcement learning from problems whose answers can be checked.

    Attributes:
        tasks: sources of problems: arithmetic, spelling, gsm8k:DIRECTORY, my_task.py:Task.
        objective: the loss; `clip_low`, `clip_high`, `advantage` and `aggregate` override its parameters.
        prompts: problems per rollout batch.
        samples: answers per problem.
        max_tokens: length limit of an answer.
        epochs: passes over each rollout batch.
        minibatches: optimizer steps per pass; the samples are divided among them.
        rewards: rewards of an answer, which are added: correct, lenient, ending, brevity.
        reward_weights: weight of each reward.
        kl: weight of KL(policy || start) in the reward; 0 only measures it, None does not compute it.
        overlong_cushion: tokens before `max_tokens` over which a penalty falls to -1 (arXiv:2503.14476, eq. 13).
        dynamic_rounds: maximum number of times that more problems are drawn to replace those whose answers all have
            the same reward (arXiv:2503.14476, section 3.2); 0 keeps such problems, None is 4 for dapo, otherwise 0.
        slots: number of answers decoded at the same time.
    """

    tasks: tuple[str, ...] = ("arithmetic",)
    objective: Objective = "dr_grpo"
    prompts: int = 16
    samples: int = 16
    max_tokens: int = 256
    temperature: float = 1.0  # Of the sampled answers.
    epochs: int = 1
    minibatches: int = 1
    clip_low: float | None = None  # Lower clipping range of the policy ratio; None is the objective's.
    clip_high: float | None = None  # Upper clipping range; None is the objective's.
    advantage: Baseline | None = None  # Baseline of the rewards; None is the objective's.
    aggregate: Aggregate | None = None  # Average over tokens; None is the objective's.
    rewards: tuple[str, ...] = ("correct",)
    reward_weights: tuple[float, ...] = (1.0,)
    kl: float | None = None
    overlong_cushion: int = 0
    dynamic_rounds: int | None = None
    slots: int = 64

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "max_tokens", "epochs", "minibatches", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"rl.{name}={getattr(self, name)} must be at least 1")
        if not self.temperature >= 1e-6:
            raise ValueError(f"rl.temperature={self.temperature} must be at least 1e-6, so that answers differ")
        if self.prompts * self.samples % self.minibatches:
            raise ValueError(
                f"rl.minibatches={self.minibatches} does not divide {self.prompts} prompts x {self.samples} samples"
            )
        if self.policy.advantage != "none" and self.samples < 2:
            raise ValueError(
                f"rl.objective={self.objective} compares answers: rl.samples={self.samples} must be at least 2"
            )
        if len(self.rewards) != len(self.reward_weights) or not all(abs(x) <= LARGEST for x in self.reward_weights):
            problem = f"must be one number for each of {self.rewards}, from -{LARGEST:g} to {LARGEST:g}"
            raise ValueError(f"rl.reward_weights={self.reward_weights} {problem}")
        if unknown := [name for name in self.rewards if name not in REWARDS]:
            raise ValueError(f"rl.rewards: unknown reward {unknown[0]!r}; expected one of: {', '.join(REWARDS)}")
        if not 0 <= self.overlong_cushion <= self.max_tokens:
            raise ValueError(f"rl.overlong_cushion={self.overlong_cushion} must lie between 0 and rl.max_tokens")
        if not ((self.kl or 0.0) >= 0 and (self.dynamic_rounds or 0) >= 0):
            raise ValueError("rl.kl and rl.dynamic_rounds must not be negative")
        SamplingParams(self.temperature, **self.truncation)

    @property
    def policy(self) -> Policy:
        """The settings of the objective, with those that are overridden here."""
        given = {name: getattr(self, name) for name in ("clip_low", "clip_high", "advantage", "aggregate")}
        return replace(OBJECTIVES[self.objective], **{k: v for k, v in given.items() if v is not None})

    @property
    def rounds(self) -> int:
        """Maximum number of extra rounds of problems per rollout batch."""
        if self.dynamic_rounds is None:
            return 4 if self.policy.drop_equal_groups else 0
        return self.dynamic_rounds

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout batch."""
        return self.epochs * self.minibatches

    @property
    def update_samples(self) -> int:
        """Samples per optimizer step."""
        return self.prompts * self.samples // self.minibatches
