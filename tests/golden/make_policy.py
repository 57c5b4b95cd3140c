"""Makes policy.npz: losses, gradients and advantages of TRL and verl in float64, on random numbers. See README.md.

Each objective has sequences of different lengths with gaps in their masks, and ratios far enough from 1 that both sides
of the clip bind, for both signs of the advantage. TRL's losses are methods of trainers that would need a model: they
are called with a stand-in that answers with the given log-probabilities.
"""

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

PROMPTS, SAMPLES, LENGTH, LONGEST = 8, 4, 14, 20
EPSILON = 1e-4
SPREAD = {"rloo": 0.3, "gspo": 1e-3, "ppo": 1.0}  # of log ratios; 0.5 for the others

# Which advantage and which loss; the settings are those of the papers, or the library's defaults.
TRL = {
    "rloo": ("leave_one_out", RLOOTrainer, {"epsilon_low": 0.2, "epsilon_high": 0.2}),
    "grpo": ("standard", GRPOTrainer, {"loss_type": "grpo"}),
    "dr_grpo": ("mean", GRPOTrainer, {"loss_type": "dr_grpo"}),
    "dapo": ("standard", GRPOTrainer, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        "standard",
        GRPOTrainer,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
}
VERL = {
    "reinforce": ("none", "reinforce", {"loss_agg_mode": "token-mean"}),
    "reinforce_mean": ("mean", "gpg", {"loss_agg_mode": "token-mean"}),
    "ppo": ("mean", "vanilla", {"loss_agg_mode": "token-mean"}),
    "gspo": ("standard", "gspo", {"loss_agg_mode": "seq-mean-token-mean"}),
}


def advantages(rule: str, rewards_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
    """verl's advantages of the samples that count; their groups may differ in size."""
    index = np.repeat(np.arange(len(rewards_PG)), rewards_PG.shape[1])[valid_PG.ravel()]
    rewards_N1 = torch.tensor(rewards_PG[valid_PG])[:, None]
    mask_N1 = torch.ones_like(rewards_N1)
    if rule == "none":
        found = rewards_N1
    elif rule == "leave_one_out":
        found, _ = core_algos.compute_rloo_outcome_advantage(rewards_N1, mask_N1, index)
    else:
        found, _ = core_algos.compute_grpo_outcome_advantage(
            rewards_N1, mask_N1, index, epsilon=EPSILON, norm_adv_by_std_in_grpo=rule == "standard"
        )
    out_PG = np.zeros(rewards_PG.shape)
    out_PG[valid_PG] = found[:, 0].numpy()
    return out_PG


def stand_in(logprobs: torch.Tensor, settings: dict[str, Any]) -> SimpleNamespace:
    def same(x: Any, **_: Any) -> Any:
        return x

    fields = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "accelerator": SimpleNamespace(gather=same, reduce=same, gather_for_metrics=same, num_processes=1),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LONGEST,
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "top_entropy_quantile": 1.0,
        "beta": 0.0,
        "aux_loss_enabled": False,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
    }
    return SimpleNamespace(**fields | settings)


def trl_loss(trainer: Any, settings: Any, case: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    ids, mask = torch.zeros(case["mask"].shape, dtype=torch.long), case["mask"]
    itself = stand_in(case["logprobs"], settings)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": case["advantages"],
        "old_per_token_logps": case["old"],
        "old_logps": (case["old"] * mask).sum(1),
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(itself, None, inputs)
    return loss, itself._metrics["train"]["clip_ratio/region_mean"][0]


def verl_loss(name: str, settings: Any, case: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    low, high = (3e-4, 4e-4) if name == "gspo" else (0.2, 0.2)
    config = ActorConfig(
        strategy="fsdp", rollout_n=SAMPLES, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=low, clip_ratio_high=high
    )
    advantages_NT = case["advantages"][:, None].expand(case["mask"].shape)
    losses = {"reinforce": core_algos.compute_policy_loss_reinforce}
    loss = losses.get(name) or core_algos.get_policy_loss_fn(name)
    value, metrics = loss(case["old"], case["logprobs"], advantages_NT, case["mask"], config=config, **settings)
    assert name != "vanilla" or metrics["actor/pg_clipfrac_lower"] > 0, "the dual clip should bind somewhere"
    return value, metrics.get("actor/pg_clipfrac", 0.0)


def main() -> None:
    generator = np.random.default_rng(0)
    lengths_N = generator.integers(1, LENGTH + 1, PROMPTS * SAMPLES)
    lengths_N[:2] = 1, LENGTH
    mask_NT = (np.arange(LENGTH) < lengths_N[:, None]) & (generator.random((len(lengths_N), LENGTH)) < 0.85)
    mask_NT[:, 0] = True
    logprobs_NT = -generator.gamma(1.0, 1.5, mask_NT.shape)
    noise_NT = generator.standard_normal(mask_NT.shape)
    rewards_PG = generator.choice([0.0, 0.5, 1.0], (PROMPTS, SAMPLES)) + generator.random((PROMPTS, SAMPLES)) / 8
    arrays: dict[str, Any] = {
        "rewards": rewards_PG,
        "valid": generator.random(rewards_PG.shape) < 0.7,
        "mask": mask_NT,
        "logprobs": logprobs_NT,
    }
    arrays["valid"][0] = np.arange(SAMPLES) == 1
    everything = np.ones(rewards_PG.shape, bool)
    for rule in ("none", "mean", "standard", "leave_one_out"):
        arrays[f"advantages/{rule}"] = advantages(rule, rewards_PG, everything)
        arrays[f"advantages_of_valid/{rule}"] = advantages(rule, rewards_PG, arrays["valid"])
    for library, table, loss_of in (("trl", TRL, trl_loss), ("verl", VERL, verl_loss)):
        for name, (rule, function, settings) in table.items():
            case = {
                "advantages": torch.tensor(arrays[f"advantages/{rule}"]).ravel(),
                "old": torch.tensor(logprobs_NT + SPREAD.get(name, 0.5) * noise_NT),
                "mask": torch.tensor(mask_NT, dtype=torch.float64),
                "logprobs": torch.tensor(logprobs_NT, requires_grad=True),
            }
            loss, clipped = loss_of(function, settings, case)
            loss.backward()
            gradient = case["logprobs"].grad.numpy()
            print(
                f"{library} {name}: loss {loss.item():.6f}, clipped {clipped:.3f}, {np.count_nonzero(gradient)} tokens"
            )
            key = f"{library}/{name}"
            arrays |= {f"{key}/loss": loss.item(), f"{key}/gradient": gradient, f"{key}/clipped": clipped}
            arrays[f"old/{name}"] = case["old"].numpy()
    versions = {name: version(name) for name in ("trl", "verl", "torch", "numpy")}
    about = {"longest": LONGEST, "epsilon": EPSILON, "versions": versions}
    np.savez_compressed(Path(__file__).parent / "policy.npz", about=json.dumps(about), **arrays)


if __name__ == "__main__":
    main()
