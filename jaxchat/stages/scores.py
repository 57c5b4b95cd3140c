"""Scores besides a stage's own loss: bits per byte of the pretraining text (forgetting), and tasks."""

from typing import Any

import jax

from jaxchat import checkpoint, processes
from jaxchat.compilation import Setup
from jaxchat.data import prepare
from jaxchat.data.cache import Log
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.evaluation import evaluate
from jaxchat.evaluation.evaluate import Asked, Settings, Solving, Texts, bits_per_byte
from jaxchat.evaluation.held_out import HeldOut
from jaxchat.evaluation.likelihoods import Scorer
from jaxchat.evaluation.questions import ask_together
from jaxchat.evaluation.solve import Style, solve
from jaxchat.experiment import STAGES, Experiment
from jaxchat.model.transformer import Params, Transformer
from jaxchat.paths import split_step, user_path
from jaxchat.tasks import Task
from jaxchat.tokenizer import Tokenizer

EVALUATION_SEED = 1_000_003  # The same noise at every evaluation, and not that of a rollout.


def pretrained_text(setup: Setup, tokenizer: Tokenizer, micro_rows: int, log: Log) -> HeldOut | None:
    """Evaluation on the held-out text of the pretraining run that this stage descends from; None if not available."""
    e = setup.experiment
    directory = user_path(split_step(e.start)[0])
    try:
        base = checkpoint.read_experiment(directory, Experiment)
        while base.chats and base.start_from:
            name = split_step(base.start_from)[0]
            directory = directory.parent / name if name in STAGES else user_path(name)
            base = checkpoint.read_experiment(directory, Experiment)
        if base.chats or not base.data.train:
            raise UserError(f"{directory} was not pretrained here")
        rows = prepare.ensure_rows(base.data, tokenizer, "val", e.cache_directory, log=log)
    except UserError as error:
        log(f"warning: the pretraining text is not scored, so forgetting is not measured: {error}")
        return None
    return HeldOut(
        setup.transformer, setup.mesh, rows=rows, bytes_per_token=tokenizer.bytes_per_token, batch_rows=micro_rows
    )


def rows_to_score(e: Experiment, held_out: HeldOut, *, last: bool) -> int:
    """Number of held-out rows to score: `eval_rows`, all for the last time, but never more than the run trains on, so
    that a short trial of a large model ends soon."""
    wanted = held_out.rows_in_all if last or not e.eval_rows else min(e.eval_rows, held_out.rows_in_all)
    return min(wanted, e.steps * e.batch_rows)


class TaskScores:
    """Scores parameters on the tasks of an experiment, each time on the same problems with the same noise.

    `style`: "text" prompts with plain text, for base models; "chat" with turns; by default the experiment's. The
    constructor reads the task files and raises `UserError` for invalid ones; `begin` takes the model.
    """

    def __init__(self, e: Experiment, tokenizer: Tokenizer, log: Log, *, style: Style | None = None) -> None:
        self._experiment, self._tokenizer, self._log = e, tokenizer, log
        self._style: Style = style or ("chat" if e.chats else "text")
        self._tasks = evaluate.parse_tasks(e.tasks, Settings(self._style), e.cache_directory / "downloads")
        self._inputs = evaluate.read(self._tasks, tokenizer, e.eval_problems)

    def begin(self, transformer: Transformer, mesh: jax.sharding.Mesh | None = None) -> None:
        """Sets the model. `mesh` holds the parameters in training; each process scores its share on its own devices."""
        self._transformer = transformer
        self._global_mesh, self._mesh = mesh, None if mesh is None else processes.own_mesh(mesh)
        self._engine: Engine | None = None
        self._scorer: Scorer | None = None

    def __call__(self, params: Params) -> dict[str, float]:
        """Returns scores by name: NAME_strict and NAME_lenient of problems, NAME_accuracy of questions, bpb, core."""
        scores: dict[str, float] = {}
        if self._global_mesh is not None and self._tasks:
            params = processes.own_copy(self._global_mesh, params)
        for job in self._tasks:
            if isinstance(job, Solving):
                scores |= self._solved(params, job.task)
        if any(not isinstance(job, Solving) for job in self._tasks):
            scores |= self._answered(params)
        for part in (self._engine, self._scorer):  # Training needs the memory.
            if part is not None:
                part.unload()
        return scores

    def _solved(self, params: Params, task: Task) -> dict[str, float]:
        """Share of a task's problems that are solved, and pass@k, each under the strict and the lenient judge."""
        e, scores = self._experiment, dict[str, float]()
        if self._engine is None:
            shape = EngineConfig(length=e.data.row_length, slots=64, prefill_batch=8)
            self._engine = Engine(self._transformer, params, self._tokenizer, shape, mesh=self._mesh)
        self._engine.load(params)
        sampling = SamplingParams(1.0, max_tokens=e.eval_tokens, seed=EVALUATION_SEED)
        solved = solve(
            self._engine,
            task,
            self._inputs[task.name],
            n=e.eval_samples,
            sampling=sampling,
            style=self._style,
            log=self._log,
        )
        scores[f"{task.name}_problems"] = len(self._inputs[task.name])
        for k, (strict, lenient) in solved.pass_at.items():
            at = f"_pass@{k}" if k > 1 else ""
            scores |= {f"{task.name}_strict{at}": strict, f"{task.name}_lenient{at}": lenient}
        return scores

    def _answered(self, params: Params) -> dict[str, float]:
        """Accuracy of questions, bits per byte of texts, and CORE over the CORE tasks of the experiment."""
        e, results = self._experiment, dict[str, dict[str, Any]]()
        if self._scorer is None:
            self._scorer = Scorer(self._transformer, params, mesh=self._mesh, length=e.data.row_length)
        self._scorer.load(params)
        for job in self._tasks:
            if isinstance(job, Asked):
                answers = [answer._asdict() for _, answer in ask_together(self._scorer, self._inputs[job.name])]
                results[job.name] = evaluate.share(answers, job.baselines)
            elif isinstance(job, Texts):
                results[job.name] = bits_per_byte(self._scorer, self._tokenizer, self._inputs[job.name])
        asked = {name: result for name, result in results.items() if "accuracy" in result}
        scores = {f"{name}_accuracy": result["accuracy"] for name, result in asked.items()}
        scores |= {f"{name}_problems": result["count"] for name, result in asked.items()}
        scores |= {name: result["bpb"] for name, result in results.items() if "bpb" in result}
        return scores | {name: result[name] for name, result in evaluate.summaries(results).items()}
