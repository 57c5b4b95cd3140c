"""Checkpoints: Orbax, asynchronous, atomic, restored under any mesh.

A stage directory holds experiment.json and checkpoints/<step>/{params, rest, facts}; `params` stands alone, so that
decoding reads nothing else. The tokenizer lies one directory up, so a run directory moves as one folder. sizes.json
keeps the size and hash of each checkpoint's files, by which a damaged one is known before it is read; it is moved to
checkpoints-damaged/ once an older one has been read in its place.
"""

import functools
import hashlib
import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxchat import processes
from jaxchat.errors import UserError, check_local, first_line
from jaxchat.machine import cores
from jaxchat.serialization import difference, from_json, to_json
from jaxchat.upgrades import FORMAT, upgraded

EXPERIMENT = "experiment.json"
CHECKPOINTS = "checkpoints"
DAMAGED = "checkpoints-damaged"
SIZES = "sizes.json"
PIECE = 4 << 20  # Bytes that a hash reads at a time.

Files = dict[str, tuple[int, str]]  # Size and hash of a checkpoint's files.


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
            raise UserError(f"{self.directory} cannot be written: {first_line(error)}") from error
        # One thread, so that a checkpoint is hashed after it was committed, beside the training steps.
        self._thread = ThreadPoolExecutor(1)
        self._committed: Future[None] | None = None
        self._recorded: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Starts writing `state`, a named tuple with a field `params`, and plain `facts`, unless the step is there."""
        self._finish()
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
        self._committed = self._thread.submit(self._manager.wait_until_finished)
        if jax.process_index() == 0:
            self._recorded = self._thread.submit(self._record, step, self._committed)

    def wait(self) -> None:
        """Returns when the last save is committed; raises `UserError` when it could not be written."""
        try:
            if self._committed is not None:
                self._committed.result()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def _finish(self) -> None:
        """Returns when the last save is committed and its hashes are written."""
        self.wait()
        if self._recorded is not None:
            self._recorded.result()

    def _record(self, step: int, committed: "Future[None]") -> None:
        if committed.exception() is None:
            record_files(self.directory, self.steps(), fresh=step)

    def restore(self, abstract: Any, warn: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest readable checkpoint in the shapes and shardings of `abstract`, None where there is none.

        A damaged one is passed over with a warning, and moved aside once an older one is read; when all are damaged a
        `UserError` says so and all stay.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                processes.everyone(functools.partial(check_files, self.directory, step))
                read = processes.everyone(functools.partial(self._read, step, abstract))
            except (ValueError, OSError) as error:
                why = first_line(error)
                warn(f"warning: checkpoint {step} in {self.directory} cannot be read ({why}); trying the one before")
                continue
            self._put_aside([later for later in steps if later > step], warn)
            return step, abstract._replace(**{**read.rest, "params": read.params}), dict(read.facts)
        if steps:
            raise UserError(
                f"none of the {len(steps)} checkpoints in {self.directory} can be read: remove it to start again"
            )
        return None

    def _read(self, step: int, abstract: Any) -> Any:
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            rest=ocp.args.StandardRestore(abstract._replace(params=None)._asdict()),
            facts=ocp.args.JsonRestore(),
        )
        # Waits for no other process: where one fails, the others are told by `everyone`.
        alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
                return reader.restore(_absolute(self.directory / str(step)), args=items)
        except Exception as error:  # Orbax raises plain Exception where an array's bytes are gone.
            raise ValueError(first_line(error)) from error

    def close(self) -> None:
        """Waits for what is being written; raises `UserError` when it could not be."""
        try:
            self._finish()
        finally:
            self._thread.shutdown()
            try:
                self._manager.close()
            except (OSError, ValueError, RuntimeError) as error:  # It tells a failed write, which we may have told.
                raise self._unwritten(error) from error

    def _put_aside(self, steps: list[int], warn: Any) -> None:
        """Moves checkpoints to checkpoints-damaged/, where they are in nobody's way: it may be the disk that erred."""
        for step in steps:
            if jax.process_index():
                break
            place = self.directory.parent / DAMAGED
            place.mkdir(parents=True, exist_ok=True)
            taken = {path.name for path in place.iterdir()}
            names = (str(step), *(f"{step}-{number}" for number in range(2, len(taken) + 3)))
            target = place / next(name for name in names if name not in taken)
            (self.directory / str(step)).rename(target)
            warn(f"checkpoint {step} is kept as {target}")
        if steps:
            processes.gather(None)  # Moved by now.
            self._manager.reload()

    def _unwritten(self, error: Exception) -> UserError:
        good = self.steps()
        last = f"the last good one is step {good[-1]}" if good else "there is none yet"
        return UserError(f"the checkpoint could not be written to {self.directory} ({first_line(error)}); {last}")


def record_files(directory: epath.Path, steps: list[int], *, fresh: int) -> None:
    """Writes size and hash of the files of every checkpoint in `steps`; only `fresh` and unknown ones are read."""
    known = _read_sizes(directory)
    recorded = {str(step): known.get(str(step)) for step in steps if step != fresh}
    found = {str(step): recorded.get(str(step)) or _measure(directory / str(step)) for step in steps}
    temporary = directory.parent / (SIZES + ".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(directory.parent / SIZES)


def check_files(directory: epath.Path, step: int, *, part: str = "") -> None:
    """Raises ValueError naming a file of a checkpoint, or of a part of it, that is not as it was written."""
    wanted = _read_sizes(directory).get(str(step))
    if wanted is None:  # Killed after the checkpoint was finished and before its sizes were.
        return
    paths = _files(directory / str(step))
    hashes = {}
    for name, written in wanted.items():
        # Earlier versions wrote the size alone.
        size, hashes[name] = written if isinstance(written, list) else (written, None)
        found = paths[name].stat().length if name in paths else 0
        if found != size:
            raise ValueError(f"{name} has {found} bytes, not {size}")
    checked = [name for name, digest in hashes.items() if digest and name.startswith(part)]
    for name, digest in _hashes({name: paths[name] for name in checked}).items():
        if digest != hashes[name]:
            raise ValueError(f"{name} has other bytes than were written")


def _measure(directory: epath.Path) -> Files:
    paths = _files(directory)
    return {name: (paths[name].stat().length, digest) for name, digest in _hashes(paths).items()}


def _files(directory: epath.Path, inside: str = "") -> dict[str, epath.Path]:
    """Every file below a directory, by its relative name."""
    found: dict[str, epath.Path] = {}
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            found |= _files(path, f"{inside}{path.name}/")
        else:
            found[inside + path.name] = path
    return found


def _hashes(paths: dict[str, epath.Path]) -> dict[str, str]:
    """BLAKE2b of files, a few at a time, in memory that does not grow with them."""

    def digest(path: epath.Path) -> str:
        found = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                found.update(piece)
        return found.hexdigest()

    with ThreadPoolExecutor(min(8, cores())) as pool:
        return dict(zip(paths, pool.map(digest, paths.values())))


def _read_sizes(directory: epath.Path) -> dict[str, Any]:
    path = directory.parent / SIZES
    try:
        value = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def finished_steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in a stage directory, oldest first."""
    return sorted(int(path.name) for path in (directory / CHECKPOINTS).glob("*") if path.name.isdecimal())


def locate(path: str) -> tuple[Path, int]:
    """The stage directory and step of `runs/tiny/pretrain` (its latest) or `runs/tiny/pretrain@300`."""
    try:
        check_local("checkpoint", path)
    except ValueError as error:
        raise UserError(str(error)) from None
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
    if wanted and (not wanted.isdecimal() or int(wanted) not in found):
        raise UserError(f"no checkpoint {wanted} in {directory}: there are {', '.join(map(str, found))}")
    return directory, int(wanted) if wanted else found[-1]


def load_params(directory: Path, step: int, abstract: Any) -> Any:
    """The parameters of one checkpoint, in the shapes and shardings of `abstract`."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    checkpoints = epath.Path(directory) / CHECKPOINTS
    with ocp.StandardCheckpointer() as reader:
        try:
            check_files(checkpoints, step, part="params/")
            return reader.restore(_absolute(checkpoints / str(step) / "params"), abstract)
        except Exception as error:  # Orbax raises plain Exception where an array's bytes are gone.
            others = [f"{directory}@{other}" for other in reversed(finished_steps(directory)) if other != step]
            hint = f"; try {others[0]}" if others else ""
            raise UserError(f"checkpoint {step} in {directory} cannot be read: {first_line(error)}{hint}") from error


def load_optimizer(directory: Path, step: int, abstract: Any) -> Any:
    """The optimizer state of one checkpoint, in the shapes and shardings of the named tuple `abstract`."""
    checkpoints = epath.Path(directory) / CHECKPOINTS
    with ocp.StandardCheckpointer() as reader:
        try:
            check_files(checkpoints, step, part="rest/")
            rest = abstract._replace(params=None)._asdict()
            return reader.restore(_absolute(checkpoints / str(step) / "rest"), rest)["optimizer"]
        except Exception as error:  # Orbax raises plain Exception where an array's bytes are gone, or shapes differ.
            raise UserError(
                f"the optimizer of {directory}@{step} is not one that this experiment can go on with "
                f"({first_line(error)}): leave out --warm_optimizer"
            ) from error


def write_experiment(directory: Path, experiment: Any) -> None:
    """Writes experiment.json, by way of a temporary file."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / (EXPERIMENT + ".tmp")
    value = {"format": FORMAT, **to_json(experiment)}
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(directory / EXPERIMENT)


def read_experiment(directory: Path, cls: type) -> Any:
    """The experiment that a stage directory was made by."""
    try:
        value = json.loads((directory / EXPERIMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / EXPERIMENT} cannot be read: {first_line(error)}") from None
    return from_json(cls, upgraded(value, directory / EXPERIMENT) if isinstance(value, dict) else value)


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
    return epath.Path(Path(path).absolute())
