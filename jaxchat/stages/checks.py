"""What is refused before a stage does anything that takes long, and what must hold at its end."""

import math
from pathlib import Path
from typing import Any

import jax

from jaxchat import checkpoint, processes
from jaxchat.decode.tools import named_tools
from jaxchat.errors import UserError
from jaxchat.evaluation.evaluate import Settings, Solving, jobs
from jaxchat.experiment import RESUMABLE, Experiment
from jaxchat.serialization import difference
from jaxchat.tasks import load_task
from jaxchat.tokenizer import Tokenizer
from jaxchat.train import Diverged, State, all_finite


def check(e: Experiment) -> None:
    """Raises `UserError` for everything that can be refused before documents are prepared or anything is written."""
    checkpoint.check_same(e.stage_directory, e, RESUMABLE)
    check_ahead(e)
    check_tasks(e)


def check_alike(e: Experiment) -> None:
    """Raises `UserError` where processes were given different experiments: they would wait for each other for ever."""
    others = processes.gather(e)
    changed = [difference(others[0], other) for other in others]
    for index, found in enumerate(changed):
        if named := [name for name in found if name not in ("directory", "data.cache", "data.workers")]:
            old, new = found[named[0]]
            raise UserError(
                f"{named[0]} is {old!r} in process 0 and {new!r} in process {index}: start all with the same command"
            )


def check_ahead(e: Experiment) -> None:
    """Raises `UserError` where the run has taken more steps already than it is asked for."""
    newest = max(checkpoint.finished_steps(e.stage_directory), default=0)
    if newest > e.steps > 0:
        raise UserError(f"{e.stage_directory} is at step {newest} already: ask for at least --steps={newest}")


def check_tasks(e: Experiment) -> None:
    """Raises `UserError` for a task or a tool that there is not, and for answers as long as a row."""
    downloads = e.cache_directory / "downloads"
    scored = [job.task for job in jobs(e.tasks, Settings("chat"), downloads) if isinstance(job, Solving)]
    for task in (*scored, *(load_task(spec, downloads) for spec in (e.rl.tasks if e.rl else ()))):
        named_tools(task.tools)
    if e.rl is not None and e.rl.max_tokens >= e.data.row_length:
        raise UserError(
            f"rl.max_tokens={e.rl.max_tokens} leaves no room for a question in a row of {e.data.row_length} tokens: "
            "lower it, or raise --data.row_length"
        )


def check_tokenizer(run_directory: Path, tokenizer: Tokenizer) -> None:
    """Raises `UserError` where the run has checkpoints that were trained with another tokenizer."""
    place = run_directory / "tokenizer"
    trained = any(checkpoint.finished_steps(path) for path in run_directory.glob("*/"))
    if trained and place.exists() and Tokenizer.load(place).hash != tokenizer.hash:
        raise UserError(
            f"{place} is another tokenizer than this experiment's: its checkpoints would not fit; "
            "give the experiment its own --name"
        )


def check_finite(state: State, what: str, remedy: str) -> None:
    """Raises `UserError` where a parameter is not finite; no later step makes one so."""
    if not jax.jit(all_finite)(state.params):
        raise UserError(f"{what} are not finite: {remedy}")


def check_end(e: Experiment, results: dict[str, Any]) -> None:
    """Raises `Diverged` where a run ends with numbers that nobody can use; all its files are written by then."""
    bad = [
        f"{name}={value}" for name, value in results.items() if isinstance(value, float) and not math.isfinite(value)
    ]
    if bad:
        raise Diverged(
            f"the run ended at step {e.steps} with {' and '.join(bad)}: train with lower learning rates under another "
            f"--name; {e.stage_directory} holds its last finite parameters"
        )
