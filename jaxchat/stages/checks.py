"""Checks of a stage: before it does anything slow, after a restore, and at its end."""

import math
from pathlib import Path
from typing import Any

import jax

from jaxchat import checkpoint, processes
from jaxchat.decode.tools import named_tools
from jaxchat.errors import UserError, require
from jaxchat.evaluation.evaluate import Settings, Solving, parse_tasks
from jaxchat.experiment import RESUMABLE, Experiment
from jaxchat.integrity import all_finite
from jaxchat.serialization import difference
from jaxchat.tasks import load_task, problems_of
from jaxchat.tokenizer import Tokenizer, load_tokenizer
from jaxchat.train import Diverged, State


def check(e: Experiment) -> None:
    """Raises `UserError` for mistakes that can be detected before data are prepared or anything is written."""
    checkpoint.check_same(e.stage_directory, e, RESUMABLE)
    newest = max(checkpoint.finished_steps(e.stage_directory), default=0)
    if newest > e.steps > 0:
        raise UserError(f"{e.stage_directory} is already at step {newest}: give at least --steps={newest}")
    check_tasks(e)
    for writer in ("tensorboard", "wandb"):
        if getattr(e, writer):
            require(writer, f"--{writer}=True needs {writer}", writer)


def check_alike(e: Experiment) -> None:
    """Raises `UserError` if the processes of a run have different experiments, which would make them deadlock."""
    experiments = processes.gather(e)
    for index, other in enumerate(experiments):
        changes = difference(experiments[0], other)
        if names := [name for name in changes if name not in ("directory", "data.cache", "data.workers")]:
            first, own = changes[names[0]]
            raise UserError(
                f"{names[0]} is {first!r} in process 0 and {own!r} in process {index}: start all with the same command"
            )


def check_tasks(e: Experiment) -> None:
    """Raises `UserError` for an unknown task or tool, problems that cannot be read, and too large `rl.max_tokens`."""
    downloads = e.cache_directory / "downloads"
    scored = [job.task for job in parse_tasks(e.tasks, Settings("chat"), downloads) if isinstance(job, Solving)]
    rewarded = [load_task(spec, downloads) for spec in (e.rl.tasks if e.rl else ())]
    for task in (*scored, *rewarded):
        named_tools(task.tools)
        problems_of(task, "train" if task in rewarded else "test", e.eval_problems)
    if e.rl is not None and e.rl.max_tokens >= e.data.row_length:
        raise UserError(
            f"rl.max_tokens={e.rl.max_tokens} leaves no room for a question in a row of {e.data.row_length} tokens: "
            "lower it, or raise --data.row_length"
        )


def check_tokenizer(run_directory: Path, tokenizer: Tokenizer) -> None:
    """Raises `UserError` if the run has checkpoints that were trained with another tokenizer."""
    path = run_directory / "tokenizer"
    trained = any(checkpoint.finished_steps(directory) for directory in run_directory.glob("*/"))
    if trained and path.exists() and load_tokenizer(path).hash != tokenizer.hash:
        raise UserError(
            f"the run's checkpoints were trained with another tokenizer ({path}) than this experiment's: "
            "give the experiment its own --name"
        )


def check_finite(state: State, what: str, remedy: str) -> None:
    """Raises `UserError` if a parameter is not finite, because training cannot repair it."""
    if not jax.jit(all_finite)(state.params):
        raise UserError(f"{what} are not finite: {remedy}")


def check_end(e: Experiment, results: dict[str, Any]) -> None:
    """Raises `Diverged` if a result is not finite; called after all files of the run are written."""
    bad = [
        f"{name}={value}" for name, value in results.items() if isinstance(value, float) and not math.isfinite(value)
    ]
    if bad:
        raise Diverged(
            f"the run ended at step {e.steps} with {' and '.join(bad)}: train with lower learning rates under another "
            f"--name; {e.stage_directory} has its last finite parameters"
        )
