"""The same model in transformers: training under torch.compile with fused AdamW, and generation."""

import itertools
import os
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.timing import timed
from jaxchat.errors import UserError, missing
from jaxchat.export import huggingface
from jaxchat.export.places import State
from jaxchat.model import Model

RATE, BETAS, EPS, WEIGHT_DECAY = 3e-4, (0.9, 0.95), 1e-8, 0.1
NO_IDS = np.zeros((1, 1, 2), np.int32)


class StepOutputs(NamedTuple):
    """Seconds and losses of training steps, and the rows of their micro-batches."""

    seconds: list[float]
    losses: list[float]
    rows: int


class Peer:
    """Trains or generates from `params` of the model, in float32, or in bfloat16 with training under autocast.

    `ids` (batches, rows, T + 1) are trained on in turn. Raises UserError without torch, or for another architecture.
    """

    def __init__(self, model: Model, params: Any, *, dtype: Any, threads: int, ids: Any = NO_IDS) -> None:
        os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # So that first steps can be compared.
        try:
            places = huggingface.family_of(model).places
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM
        except UserError as error:
            raise UserError(f"the peer knows the October 2025 family, --family=october2025: {error}") from None
        except ImportError as error:
            raise missing(f"--peer=transformers: {error}", "interop") from None
        torch.set_num_threads(threads)
        self._torch, self._dtype, half = torch, getattr(torch, str(dtype)), str(dtype) == "bfloat16"
        device = self._device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")  # As XLA does.
        no_ends: Any = SimpleNamespace(bos=None, end=None)
        config = huggingface.config_json(model, no_ends, length=4096, dtype="float32")
        theirs = self._model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(device)
        weights = State(model, jax.device_get(params), places).items()
        theirs.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in weights})
        self._optimizer = torch.optim.AdamW(theirs.parameters(), RATE, BETAS, EPS, WEIGHT_DECAY, fused=True)
        self._batches, self._rows = itertools.cycle(torch.from_numpy(ids).long().to(device)), ids.shape[1]

        def loss(tokens: Any, targets: Any) -> Any:
            with torch.autocast(device, torch.bfloat16, enabled=half):
                logits = theirs(tokens, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

        self._loss = torch.compile(loss)

    def _step(self, ids: Any) -> float:
        """One step, in as many micro-batches as the memory needs; returns the loss."""
        losses = []
        self._optimizer.zero_grad(set_to_none=True)
        try:
            for part in ids.split(self._rows):
                loss = self._loss(part[:, :-1], part[:, 1:]) * (len(part) / len(ids))
                loss.backward()
                losses.append(loss.detach())
            self._optimizer.step()
            return float(sum(losses))
        except self._torch.cuda.OutOfMemoryError:
            if self._rows == 1:
                raise
        self._rows //= 2
        self._torch._dynamo.reset()
        self._torch.cuda.empty_cache()
        return self._step(ids)

    def train(self, steps: int) -> StepOutputs:
        """`steps` steps, after one that warms up."""
        found = [timed(partial(self._step, ids)) for ids in itertools.islice(self._batches, 1 + steps)]
        return StepOutputs([seconds for _, seconds in found[1:]], [loss for loss, _ in found], self._rows)

    def generate(self, prompts: list[list[int]], count: int) -> list[tuple[int, ...]]:
        """Greedy answers of `count` tokens to prompts of equal length."""
        ids, model = self._torch.tensor(prompts, device=self._device), self._model.eval().to(self._dtype)
        limits = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        with self._torch.inference_mode():
            out = model.generate(ids, attention_mask=self._torch.ones_like(ids), **limits)
        return [tuple(row[ids.shape[1] :]) for row in out.tolist()]
