"""What SFT and RL are scored on beside their own loss: pretraining text that may be forgotten, and problems."""

from pathlib import Path
from typing import Any

import jax

from jaxchat import checkpoint, processes
from jaxchat.compilation import Setup
from jaxchat.data import prepare
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.evaluation.bits_per_byte import BitsPerByte
from jaxchat.evaluation.evaluate import Asked, Settings, Solving, Texts, bits_per_byte, jobs, share, summaries
from jaxchat.evaluation.likelihoods import Scorer
from jaxchat.evaluation.questions import ask_together
from jaxchat.evaluation.solve import Style, solve
from jaxchat.experiment import STAGES, Experiment
from jaxchat.model.transformer import Params, Transformer
from jaxchat.stages.stage import Log
from jaxchat.tasks import Task, problems_of
from jaxchat.tokenizer import Tokenizer

EVALUATION_SEED = 1_000_003  # Its noise is the same at every step, and not that of any rollout.


def pretrained_text(setup: Setup, tokenizer: Tokenizer, micro_rows: int, log: Log) -> BitsPerByte | None:
    """Bits per byte on the held-out text of the pretraining that this stage goes back to, where that is at hand."""
    e = setup.experiment
    directory = Path(e.start.partition("@")[0])
    try:
        base = checkpoint.read_experiment(directory, Experiment)
        while base.chats:
            name = base.start_from.partition("@")[0]
            directory = directory.parent / name if name in STAGES else Path(name)
            base = checkpoint.read_experiment(directory, Experiment)
        rows = prepare.ensure_rows(base.data, tokenizer, "val", e.cache_directory, log=log)
    except UserError as error:
        log(f"warning: what is forgotten of the pretraining text is not measured: {error}")
        return None
    return BitsPerByte(
        setup.transformer, setup.mesh, rows=rows, bytes_per_token=tokenizer.bytes_per_token, batch_rows=micro_rows
    )


def task_scores(setup: Setup, tokenizer: Tokenizer, log: Log) -> "TaskScores | None":
    """What scores the tasks of an experiment, if it names any."""
    e = setup.experiment
    style: Style = "chat" if e.chats else "text"
    return TaskScores(e, setup.transformer, tokenizer, log, style=style, mesh=setup.mesh) if e.tasks else None


class TaskScores:
    """The shares of test problems solved and of questions answered right, the same ones with the same noise always.

    A base model is asked in the words of a text, a chat model in turns. Files are read, and may be refused, at once.
    """

    def __init__(
        self,
        e: Experiment,
        transformer: Transformer,
        tokenizer: Tokenizer,
        log: Log,
        *,
        style: Style,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self._experiment, self._transformer, self._tokenizer, self._log = e, transformer, tokenizer, log
        self._style: Style = style
        self._global_mesh, self._mesh = mesh, None if mesh is None else processes.own_mesh(mesh)
        self._jobs = jobs(e.tasks, Settings(style), e.cache_directory / "downloads")
        limit = e.eval_problems
        self._questions = {job.name: job.questions(tokenizer, limit) for job in self._jobs if isinstance(job, Asked)}
        self._problems = {
            job.name: problems_of(job.task, "test")[:limit] for job in self._jobs if isinstance(job, Solving)
        }
        self._engine: Engine | None = None
        self._scorer: Scorer | None = None

    def __call__(self, params: Params) -> dict[str, float]:
        """Scores by name: NAME_strict, NAME_lenient and pass@k of problems, NAME_accuracy of questions, core."""
        found: dict[str, float] = {}
        if self._global_mesh is not None:
            params = processes.own_copy(self._global_mesh, params)
        for job in self._jobs:
            if isinstance(job, Solving):
                found |= self._solved(params, job.task)
        if any(not isinstance(job, Solving) for job in self._jobs):
            found |= self._answered(params)
        return found

    def _solved(self, params: Params, task: Task) -> dict[str, float]:
        """Shares of a task's problems that are solved, and pass@k, each judged strictly and leniently."""
        e, found = self._experiment, dict[str, float]()
        if self._engine is None:
            shape = EngineConfig(length=e.data.row_length, slots=64, prefill_batch=8)
            self._engine = Engine(self._transformer, params, self._tokenizer, shape, mesh=self._mesh)
        self._engine.load(params)
        sampling = SamplingParams(1.0, max_tokens=e.eval_tokens, seed=EVALUATION_SEED)
        solved = solve(
            self._engine,
            task,
            self._problems[task.name],
            n=e.eval_samples,
            sampling=sampling,
            style=self._style,
            log=self._log,
        )
        for k, (strict, lenient) in solved.pass_at.items():
            at = f"_pass@{k}" if k > 1 else ""
            found |= {f"{task.name}_strict{at}": strict, f"{task.name}_lenient{at}": lenient}
        return found

    def _answered(self, params: Params) -> dict[str, float]:
        """Shares of questions answered right; bits per byte of texts; CORE over those of its tasks that were asked."""
        e, results = self._experiment, dict[str, dict[str, Any]]()
        if self._scorer is None:
            self._scorer = Scorer(self._transformer, params, mesh=self._mesh, length=e.data.row_length)
        self._scorer.load(params)
        for job in self._jobs:
            if isinstance(job, Asked):
                answers = [answer._asdict() for _, answer in ask_together(self._scorer, self._questions[job.name])]
                results[job.name] = share(answers, job.baselines)
            elif isinstance(job, Texts):
                results[job.name] = bits_per_byte(self._scorer, self._tokenizer, job.spec, e.eval_problems)
        found = {f"{name}_accuracy": result["accuracy"] for name, result in results.items() if "accuracy" in result}
        found |= {name: result["bpb"] for name, result in results.items() if "bpb" in result}
        return found | {name: result[name] for name, result in summaries(results).items()}
