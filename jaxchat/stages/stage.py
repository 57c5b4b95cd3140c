"""The interface between a stage and the training loop, and the checkpoint that a stage starts from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import optax

from jaxchat import checkpoint
from jaxchat.compilation import Setup
from jaxchat.data.cache import Log, read_json, write_json
from jaxchat.errors import UserError
from jaxchat.experiment import STAGES, Experiment
from jaxchat.model.transformer import Params
from jaxchat.objectives.objective import Objective
from jaxchat.paths import split_step, user_path
from jaxchat.serialization import flags
from jaxchat.stages.scores import TaskScores
from jaxchat.tokenizer import Tokenizer, load_tokenizer
from jaxchat.train import State

START = "start.json"
REFERENCE = "reference"

Record = dict[str, Any]


class Stage(Protocol):
    """A stream of batches with its evaluations. `steps` is the number of optimizer steps.

    `tasks` has read its files, and waits for `begin` to give it the model.
    """

    steps: int

    def __init__(self, e: Experiment, tokenizer: Tokenizer, tasks: TaskScores, log: Log) -> None: ...

    @staticmethod
    def objective(e: Experiment) -> Objective:
        """The loss that training minimises, with the columns that `batch_at` provides."""

    def begin(self, setup: Setup, micro_rows: int, start: int, facts: Record) -> None:
        """Prepares for optimizer step `start`; `facts` is the metadata of the checkpoint, empty without one."""

    def batch_at(self, index: int, state: State) -> Any:
        """The batch of optimizer step `index`, on the devices."""

    @property
    def numbers(self) -> Callable[[int, dict[str, float]], Record] | None:
        """Computes further numbers of a step's record from its metrics; None if all steps have as many tokens."""

    def score(self, state: State, *, last: bool) -> Record:
        """Evaluates the state and returns scores by name; `last` evaluates all held-out rows."""

    def facts(self, number: int) -> Record:
        """Metadata for the checkpoint of step `number`, from which the stream can resume."""

    def total(self) -> Record:
        """Totals of the whole stage, for the launcher's last line."""

    def write_sources(self) -> None:
        """Writes a description of the training data to the run directory."""

    def close(self) -> None: ...


def inherited(e: Experiment) -> tuple[Experiment, Tokenizer | None]:
    """Returns the experiment with model and vocabulary of its starting checkpoint, and the tokenizer of that.

    A stage that has started has them itself, so it resumes without that checkpoint.
    """
    if not e.start_from:
        return e, None
    directory, before = _before(e)
    tokenizer = load_tokenizer(directory.parent / "tokenizer")
    model = dataclasses.replace(before.model, layer_loop=e.model.layer_loop, remat=e.model.remat)
    data = dataclasses.replace(e.data, vocab=before.data.vocab)
    return dataclasses.replace(e, model=model, depth=before.depth, data=data), tokenizer


def _before(e: Experiment) -> tuple[Path, Experiment]:
    """The stage directory that model and tokenizer are taken from, and its experiment."""
    directory = e.stage_directory if (e.stage_directory / START).is_file() else locate_start(e)[0]
    return directory, checkpoint.read_experiment(directory, Experiment)


def not_used(given: Experiment, e: Experiment) -> str | None:
    """A sentence that names the settings of `given` that `inherited` replaced in its result `e`; None without any."""
    wanted, taken = flags(given), flags(e)
    if given.start_from:
        own = (f"data.tokenizer.{name}" for name in ("algorithm", "chat_format", "extra_specials"))
        before = flags(_before(given)[1])
        taken |= {name: before[name] for name in own}
    if given.start_from and given.data.tokenizer.path:
        taken["data.tokenizer.path"] = str(locate_start(given)[0].parent / "tokenizer")
    replaced = sorted((name for name in wanted if wanted[name] != taken.get(name)), key=lambda name: name.count("."))
    if not replaced:
        return None
    name, more = replaced[0], f" and {len(replaced) - 1} more" * (len(replaced) > 1)
    instead = f"{name}={wanted[name]!r}{more} of this command is not used ({taken.get(name)!r} there)"
    return f"the model is that of {e.start}: {instead}"


def locate_start(e: Experiment) -> tuple[Path, int]:
    """Directory and step of the checkpoint that the experiment starts from; `UserError` if it does not exist.

    Once the stage has started it is the one that start.json names, although `start_from` may have a newer one.
    """
    if record := read_json(e.stage_directory / START):
        directory, step = user_path(split_step(e.start)[0]), record["step"]
        gone = step not in checkpoint.finished_steps(directory)
        if gone or checkpoint.params_hash(directory, step) != record["params"]:
            problem = (
                f"{e.stage_directory} started from {directory}@{step}, which is {'gone' if gone else 'another now'}"
            )
            raise UserError(f"{problem}: remove {e.stage_directory} to start again, or give this run its own --name")
        return directory, step
    try:
        return checkpoint.locate(e.start)
    except UserError as error:
        stage = Path(split_step(e.start)[0]).name
        hint = f"; train that stage first, with --config=...{'' if stage == 'pretrain' else f':{stage}'}"
        known = stage in STAGES and split_step(e.start_from)[0] == stage
        raise UserError(f"{e.stage} starts from {e.start}: {error}{hint if known else ''}") from None


def record_start(e: Experiment) -> None:
    """Writes start.json, the step and the parameters' hash of the checkpoint that the stage starts from.

    With a KL reference it keeps that checkpoint's parameters in reference/, as hard links where the file system has
    them: `--keep` may remove the checkpoint from its own stage, and the stage may be trained further.
    """
    path = e.stage_directory / START
    if not e.start_from or path.is_file():
        return
    directory, step = locate_start(e)
    if e.rl is not None and e.rl.kl is not None:
        checkpoint.copy_params(directory, step, e.stage_directory / REFERENCE)
    write_json(path, {"step": step, "params": checkpoint.params_hash(directory, step)})


def reference_params(e: Experiment, abstract: Any, log: Log) -> Params:
    """The parameters of the KL reference, those that the stage started from, in the shardings of `abstract`."""
    own = e.stage_directory / REFERENCE
    kept = checkpoint.finished_steps(own) if (e.stage_directory / START).is_file() else []
    directory, step = (own, kept[0]) if kept else locate_start(e)
    log(f"KL reference: {directory}@{step}")
    return checkpoint.load_params(directory, step, abstract)


def started(setup: Setup, fresh: State) -> State:
    """A fresh state with the parameters of the starting checkpoint, and with `warm_optimizer` also its moments."""
    e = setup.experiment
    directory, step = locate_start(e)
    params = checkpoint.load_params(directory, step, setup.abstract.params)
    if not e.warm_optimizer:
        return fresh._replace(params=params)
    old = checkpoint.load_rest(directory, step, setup.abstract, "leave out --warm_optimizer")["optimizer"]
    # Counters restart, so that schedules do. Adam's own count is restored, because it corrects the bias of the moments.
    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731

    def warm(new: Any, before: Any) -> Any:
        return before if is_adam(new) else (new if new.ndim == 0 else before)

    return fresh._replace(params=params, optimizer=jax.tree.map(warm, fresh.optimizer, old, is_leaf=is_adam))
