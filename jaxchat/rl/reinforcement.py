"""The RL stage: trains on batches of answers that the model samples with its current parameters."""

import functools
import time
from typing import Any

import jax
import numpy as np

from jaxchat import processes, sharding
from jaxchat.compilation import Setup
from jaxchat.data.cache import Log
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.objectives.logprobs import score_tokens
from jaxchat.objectives.policy import PolicyGradient
from jaxchat.rl.rollouts import Columns, RolloutStream, TokenScorer
from jaxchat.rl.settings import RL
from jaxchat.stages.scores import TaskScores, pretrained_text, rows_to_score
from jaxchat.stages.stage import reference_params
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import State


def settings(e: Experiment) -> RL:
    """The RL settings of an experiment; raises `UserError` if it has none."""
    if e.rl is None:
        raise UserError(f"stage {e.stage!r} needs RL settings: use a configuration such as configs/tiny.py:rl")
    return e.rl


class Reinforcement:
    """Stage that trains on rewards of sampled answers; see `stages.stage.Stage` for the methods."""

    def __init__(self, e: Experiment, tokenizer: Tokenizer, tasks: TaskScores, log: Log) -> None:
        self._rl, self._tokenizer, self._tasks, self._log = settings(e), tokenizer, tasks, log
        self.steps = e.steps
        if e.steps % self._rl.updates:
            raise UserError(
                f"steps={e.steps} is not a multiple of the {self._rl.updates} updates (rl.epochs x rl.minibatches) "
                f"of one rollout batch: choose a multiple of {self._rl.updates}"
            )

    @staticmethod
    def objective(e: Experiment) -> PolicyGradient:
        rl = settings(e)
        return PolicyGradient(rl.policy, rl.temperature, rl.truncates)

    def begin(self, setup: Setup, micro_rows: int, start: int, facts: dict[str, Any]) -> None:
        """Creates the engine that samples, the scorer and the evaluations; resumes the stream of problems."""
        e, rl = setup.experiment, self._rl
        self._setup, self._dispatched = setup, time.perf_counter()
        self._records: dict[int, dict[str, Any]] = {}
        shape = EngineConfig(length=e.data.row_length, slots=rl.slots, prefill_batch=8)
        engine = Engine(setup.transformer, None, self._tokenizer, shape, mesh=processes.own_mesh(setup.mesh))
        reference = None
        if rl.kl is not None:
            reference = reference_params(e, setup.abstract.params, self._log)
        self._stream = RolloutStream(
            rl,
            engine,
            scorer(setup),
            seed=e.seed,
            row_length=e.data.row_length,
            micro_rows=micro_rows,
            reference=reference,
            own_copy=functools.partial(processes.own_copy, setup.mesh),
            downloads=e.cache_directory / "downloads",
            log=self._log,
        )
        self._stream.cursor = facts.get("cursor", 0)
        self._log("sampling, after the decoding programs are compiled")
        self._text = pretrained_text(setup, self._tokenizer, micro_rows, self._log)
        self._tasks.begin(setup.transformer, setup.mesh)

    def batch_at(self, index: int, state: State) -> Any:
        """The columns (micro-batches, rows, T) of a step, after sampling new answers if the step is the first of its
        rollout batch."""
        jax.block_until_ready(state.params)  # So that training time is not counted as sampling time.
        start = time.perf_counter()
        if index in self._records:
            self._records[index]["train_seconds"] = start - self._dispatched
        columns, used = self._stream.batch(index, state.params)
        count = jax.device_put(np.int32(used), sharding.replicated(self._setup.mesh))
        batch = sharding.put_whole(self._setup.mesh, columns) | {"count": count}
        self._dispatched = time.perf_counter()
        fresh = index % self._rl.updates == 0
        times = {name: self._stream.facts[name] if fresh else 0.0 for name in ("sample_seconds", "score_seconds")}
        trained = int((columns["weights"] > 0).sum())
        self._records[index + 1] = {**self._stream.facts, **times, "micro_batches": used, "trained_tokens": trained}
        return batch

    def numbers(self, number: int, values: dict[str, float]) -> dict[str, Any]:
        """Metrics of the rollout batch, the gap between sampler and trainer, and seconds per phase."""
        record = self._records.pop(number)
        record.setdefault("train_seconds", time.perf_counter() - self._dispatched)
        # Replaces the loop's time, which would include the sampling for the next step.
        record["seconds"] = sum(record[f"{part}_seconds"] for part in ("sample", "score", "train"))
        return record

    def score(self, state: State, *, last: bool) -> dict[str, Any]:
        """Task scores, and bits per byte of the pretraining text."""
        e, scores = self._setup.experiment, dict[str, Any]()
        if self._text is not None:
            scores["val_rows"] = rows_to_score(e, self._text, last=last)
            scores["val_bpb"] = self._text(state.params, scores["val_rows"])
        return scores | self._tasks(state.params)

    def facts(self, number: int) -> dict[str, Any]:
        return {"cursor": self._stream.cursor}

    def total(self) -> dict[str, Any]:
        return {"problems": self._stream.cursor}

    def write_sources(self) -> None:
        """Does nothing: the tasks are part of the experiment."""

    def close(self) -> None:
        """Does nothing."""


def scorer(setup: Setup) -> TokenScorer:
    """Compiles the trainer's log-probabilities and entropies of a micro-batch, computed as in the training step."""
    transformer, objective = setup.transformer, Reinforcement.objective(setup.experiment)

    def score(params: Any, columns: Any) -> Any:
        hidden_BTM = transformer.apply(params, columns["tokens"], segments_BT=columns["segments"]).hidden
        distribution = objective.distribution(transformer.config, columns)
        return score_tokens(hidden_BTM, transformer.head(params), columns["targets"], **distribution)[:2]

    compiled = jax.jit(score, out_shardings=sharding.replicated(setup.mesh))

    def run(params: Any, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        needed: Columns = {
            name: columns[name][None] for name in ("tokens", "targets", "segments", "support") if name in columns
        }
        placed = {name: column[0] for name, column in sharding.put_whole(setup.mesh, needed).items()}
        return jax.device_get(compiled(params, placed))

    return run
