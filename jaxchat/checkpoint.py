"""Checkpoints: Orbax, asynchronous, atomic, restored under any mesh.

A stage directory holds experiment.json and checkpoints/<step>/{params, rest, facts}; `params` stands alone, so that
decoding reads nothing else. The tokenizer lies one directory up, so a run directory moves as one folder. sizes.json
keeps the sizes of each checkpoint's files, by which a damaged one is known before it is read.
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
SIZES = "sizes.json"


class Checkpoints:
    """The checkpoints of one stage directory; saving runs in the background, one at a time."""

    def __init__(self, directory: Path | str, *, keep: int) -> None:
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = epath.Path(directory) / CHECKPOINTS
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        try:
            self._manager = ocp.CheckpointManager(_absolute(self.directory), options=options)
        except OSError as error:
            raise UserError(f"{self.directory} cannot be written: {_first_line(error)}") from error

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
        if jax.process_index() == 0:
            record_sizes(self.directory, self.steps())

    def restore(self, abstract: Any, warn: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest readable checkpoint in the shapes and shardings of `abstract`, None where there is none.

        A damaged one is passed over with a warning; when all are damaged a `UserError` says so.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                check_sizes(self.directory, step)
                items = ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    rest=ocp.args.StandardRestore(abstract._replace(params=None)._asdict()),
                    facts=ocp.args.JsonRestore(),
                )
                read = self._manager.restore(step, args=items)
            except Exception as error:  # Orbax raises plain Exception where an array's bytes are gone.
                why = _first_line(error)
                warn(f"warning: checkpoint {step} in {self.directory} cannot be read ({why}); trying the one before")
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
        """Waits for what is being written; raises `UserError` when it could not be."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _unwritten(self, error: Exception) -> UserError:
        good = self.steps()
        last = f"the last good one is step {good[-1]}" if good else "there is none yet"
        return UserError(f"the checkpoint could not be written to {self.directory} ({_first_line(error)}); {last}")


def record_sizes(directory: epath.Path, steps: list[int]) -> None:
    """Writes the sizes of the files of every checkpoint in `steps`; those known already are not measured again."""
    known = _read_sizes(directory)
    sizes = {str(step): known.get(str(step)) or _sizes(directory / str(step)) for step in steps}
    if sizes != known:
        temporary = directory.parent / (SIZES + ".tmp")
        temporary.write_text(json.dumps(sizes, indent=1) + "\n")
        temporary.replace(directory.parent / SIZES)


def check_sizes(directory: epath.Path, step: int) -> None:
    """Raises ValueError naming a file of a checkpoint that does not have its size any more."""
    wanted = _read_sizes(directory).get(str(step))
    if wanted is None:  # Killed after the checkpoint was finished and before its sizes were.
        return
    found = _sizes(directory / str(step))
    for name, size in wanted.items():
        if found.get(name) != size:
            raise ValueError(f"{name} has {found.get(name, 0)} bytes, not {size}")


def _sizes(directory: epath.Path, inside: str = "") -> dict[str, int]:
    """The size of every file below a directory, by its relative name."""
    found: dict[str, int] = {}
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            found |= _sizes(path, f"{inside}{path.name}/")
        else:
            found[inside + path.name] = path.stat().length
    return found


def _read_sizes(directory: epath.Path) -> dict[str, dict[str, int]]:
    path = directory.parent / SIZES
    try:
        value = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def finished_steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in a stage directory, oldest first."""
    return sorted(int(path.name) for path in (directory / CHECKPOINTS).glob("*") if path.name.isdigit())


def locate(path: str) -> tuple[Path, int]:
    """The stage directory and step of `runs/tiny/pretrain` (its latest) or `runs/tiny/pretrain@300`."""
    name, _, wanted = path.rpartition("@") if "@" in Path(path).name else (path, "", "")
    directory = Path(name)
    if not (directory / EXPERIMENT).is_file():
        inside = [p.parent.name for p in sorted(directory.glob(f"*/{EXPERIMENT}"))] if directory.is_dir() else []
        hint = (
            f"did you mean {directory / inside[-1]}?" if inside else "train first: python -m launch.train --config=..."
        )
        raise UserError(f"no checkpoint in {directory}: {hint}")
    found = finished_steps(directory)
    if not found:
        raise UserError(f"no checkpoint in {directory / CHECKPOINTS}: the run has not reached its first one yet")
    if wanted and (not wanted.isdigit() or int(wanted) not in found):
        raise UserError(f"no checkpoint {wanted} in {directory}: there are {', '.join(map(str, found))}")
    return directory, int(wanted) if wanted else found[-1]


def load_params(directory: Path, step: int, abstract: Any) -> Any:
    """The parameters of one checkpoint, in the shapes and shardings of `abstract`."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    checkpoints = epath.Path(directory) / CHECKPOINTS
    with ocp.StandardCheckpointer() as reader:
        try:
            check_sizes(checkpoints, step)
            return reader.restore(_absolute(checkpoints / str(step) / "params"), abstract)
        except Exception as error:  # Orbax raises plain Exception where an array's bytes are gone.
            others = [f"{directory}@{other}" for other in reversed(finished_steps(directory)) if other != step]
            hint = f"; try {others[0]}" if others else ""
            raise UserError(f"checkpoint {step} in {directory} cannot be read: {_first_line(error)}{hint}") from error


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
        others = len(changed) - 1
        more = f" and {others} more field{'s' * (others > 1)}" if others else ""
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
