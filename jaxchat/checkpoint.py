"""Checkpoints: Orbax, asynchronous, atomic, restored under any mesh.

A stage directory holds experiment.json and checkpoints/<step>/{params, rest, facts}; `params` stands alone, so that
decoding reads nothing else. The tokenizer lies one directory up, so a run directory moves as one folder.
"""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxchat.config import UserError, difference, from_json, to_json

EXPERIMENT = "experiment.json"
CHECKPOINTS = "checkpoints"

# What reading a damaged checkpoint raises, in Orbax, TensorStore and JSON.
DAMAGED = (ValueError, OSError, KeyError, TypeError)


class Checkpoints:
    """The checkpoints of one stage directory; saving runs in the background, one at a time."""

    def __init__(self, directory: Path | str, *, keep: int) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = epath.Path(directory) / CHECKPOINTS
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(_absolute(self.directory), options=options)

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Starts writing `state`, a named tuple with a field `params`, and plain `facts`, unless the step is there."""
        self.wait()
        if step in self._manager.all_steps():
            return
        rest = state._replace(params=None)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(rest._asdict()),
            facts=ocp.args.JsonSave(facts),
        )
        try:
            self._manager.save(step, args=items)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Returns when the last save is committed; raises `UserError` when it could not be written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def restore(self, abstract: Any, warn: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest readable checkpoint in the shapes and shardings of `abstract`, None where there is none.

        A damaged one is passed over with a warning; when all are damaged a `UserError` says so.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                items = ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    rest=ocp.args.StandardRestore(abstract._replace(params=None)._asdict()),
                    facts=ocp.args.JsonRestore(),
                )
                read = self._manager.restore(step, args=items)
            except DAMAGED as error:
                why = _first_line(error)
                warn(f"checkpoint {step} in {self.directory} cannot be read ({why}); trying the one before")
                continue
            for later in [s for s in steps if s > step]:
                self._manager.delete(later)
            return step, abstract._replace(**{**read.rest, "params": read.params}), dict(read.facts)
        if steps:
            raise UserError(
                f"none of the {len(steps)} checkpoints in {self.directory} can be read: remove it to start again"
            )
        return None

    def close(self) -> None:
        self._manager.close()

    def _unwritten(self, error: Exception) -> UserError:
        good = self.steps()
        last = f"the last good one is step {good[-1]}" if good else "there is none yet"
        return UserError(f"the checkpoint could not be written to {self.directory} ({_first_line(error)}); {last}")


def locate(path: str) -> tuple[Path, int]:
    """The stage directory and step of `runs/tiny/pretrain` (its latest) or `runs/tiny/pretrain@300`."""
    name, _, wanted = path.partition("@")
    directory = Path(name)
    if not (directory / EXPERIMENT).is_file():
        inside = [p.parent.name for p in sorted(directory.glob(f"*/{EXPERIMENT}"))] if directory.is_dir() else []
        hint = (
            f"did you mean {directory / inside[-1]}?" if inside else "train first: python -m launch.train --config=..."
        )
        raise UserError(f"no checkpoint in {directory}: {hint}")
    found = sorted(int(p.name) for p in (directory / CHECKPOINTS).glob("*") if p.name.isdigit())
    if not found:
        raise UserError(f"no checkpoint in {directory / CHECKPOINTS}: the run has not reached its first one yet")
    if wanted and (not wanted.isdigit() or int(wanted) not in found):
        raise UserError(f"no checkpoint {wanted} in {directory}: there are {', '.join(map(str, found))}")
    return directory, int(wanted) if wanted else found[-1]


def load_params(directory: Path, step: int, abstract: Any) -> Any:
    """The parameters of one checkpoint, in the shapes and shardings of `abstract`."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    path = _absolute(epath.Path(directory) / CHECKPOINTS / str(step) / "params")
    with ocp.StandardCheckpointer() as reader:
        try:
            return reader.restore(path, abstract)
        except DAMAGED as error:
            raise UserError(f"checkpoint {step} in {directory} cannot be read: {_first_line(error)}") from error


def write_experiment(directory: Path, experiment: Any) -> None:
    """Writes experiment.json, by way of a temporary file."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / (EXPERIMENT + ".tmp")
    temporary.write_text(json.dumps(to_json(experiment), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(directory / EXPERIMENT)


def read_experiment(directory: Path, cls: type) -> Any:
    """The experiment that a stage directory was made by."""
    try:
        value = json.loads((directory / EXPERIMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / EXPERIMENT} cannot be read: {_first_line(error)}") from None
    return from_json(cls, value)


def check_same(directory: Path, experiment: Any, allowed: tuple[str, ...]) -> None:
    """Raises `UserError` when `directory` holds another experiment, naming what differs beyond `allowed` fields."""
    if not (directory / EXPERIMENT).is_file():
        return
    before = read_experiment(directory, type(experiment))
    changed = {
        name: values
        for name, values in difference(before, experiment).items()
        if not any(name == field or (field.endswith(".") and name.startswith(field)) for field in allowed)
    }
    if changed:
        name, (old, new) = next(iter(changed.items()))
        more = f" and {len(changed) - 1} more fields" if len(changed) > 1 else ""
        raise UserError(
            f"{directory} holds another experiment: {name} was {old!r} and is now {new!r}{more}; "
            "give this one its own --name, or remove that directory"
        )


def abstract_like(shapes: Any, placements: Any) -> Any:
    """Shapes and types with shardings, for a restore."""
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placements)


def _absolute(path: Any) -> Any:
    return path if "://" in str(path) else epath.Path(Path(path).absolute())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
