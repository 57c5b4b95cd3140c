"""Checkpoints with Orbax: asynchronous, atomic, restored under any mesh.

A stage directory holds experiment.json and checkpoints/<step>/{params, rest, facts}; decoding reads only `params`. The
tokenizer is one directory up, so a run directory moves as one folder. sizes.json holds the size and hash of each
checkpoint's files, so that a damaged checkpoint is recognised before it is read. It is moved to checkpoints-damaged/
once an older one has been restored in its place.
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
CHUNK_BYTES = 4 << 20  # Bytes that a hash reads at a time.

Files = dict[str, tuple[int, str]]  # Size and hash of a checkpoint's files, by relative name.


class Checkpoints:
    """The checkpoints of one stage directory: the newest `keep` ones. Saves run in the background, one at a time."""

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
        # One thread, so that a checkpoint is hashed after it is committed, in parallel with training.
        self._thread = ThreadPoolExecutor(1)
        self._committed: Future[None] | None = None
        self._recorded: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Starts writing `state`, a named tuple with a field `params`, and JSON `facts`, unless the step is saved."""
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
            raise self._write_error(error) from error
        self._committed = self._thread.submit(self._manager.wait_until_finished)
        if jax.process_index() == 0:
            self._recorded = self._thread.submit(self._record, step, self._committed)

    def wait(self) -> None:
        """Waits until the last save is committed; raises `UserError` if it could not be written."""
        try:
            if self._committed is not None:
                self._committed.result()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(error) from error

    def _finish(self) -> None:
        """Waits until the last save is committed and its hashes are written."""
        self.wait()
        if self._recorded is not None:
            self._recorded.result()

    def _record(self, step: int, committed: "Future[None]") -> None:
        if committed.exception() is None:
            record_files(self.directory, self.steps(), fresh=step)

    def restore(self, abstract: Any, warn: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest readable checkpoint in the shapes and shardings of `abstract`: (step, state, facts).

        Returns None if there is no checkpoint. A damaged one is skipped with a warning, and moved aside once an older
        one is read. If all are damaged, raises `UserError` and moves none.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                processes.everyone(functools.partial(check_files, self.directory, step))
                read = processes.everyone(functools.partial(self._read, step, abstract))
            except (ValueError, OSError) as error:
                reason = first_line(error)
                warn(f"warning: checkpoint {step} in {self.directory} cannot be read ({reason}); trying an older one")
                continue
            self._move_aside([later for later in steps if later > step], warn)
            return step, abstract._replace(**{**read.rest, "params": read.params}), dict(read.facts)
        if steps:
            problem = f"none of the {len(steps)} checkpoints in {self.directory} can be read"
            raise UserError(f"{problem}: remove that directory to start again")
        return None

    def _read(self, step: int, abstract: Any) -> Any:
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            rest=ocp.args.StandardRestore(abstract._replace(params=None)._asdict()),
            facts=ocp.args.JsonRestore(),
        )
        # Orbax must not wait for other processes here: `everyone` reports a failure to all of them.
        independent = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=independent) as reader:
                return reader.restore(_absolute(self.directory / str(step)), args=items)
        except Exception as error:  # Orbax raises plain Exception if bytes of an array are missing.
            raise ValueError(first_line(error)) from error

    def close(self) -> None:
        """Waits for pending writes and closes; raises `UserError` if a checkpoint could not be written."""
        try:
            self._finish()
        finally:
            self._thread.shutdown()
            try:
                self._manager.close()
            except (OSError, ValueError, RuntimeError) as error:  # It reports a failed write again.
                raise self._write_error(error) from error

    def _move_aside(self, steps: list[int], warn: Any) -> None:
        """Moves checkpoints to checkpoints-damaged/. Deleting them could lose good data if the disk misread them."""
        for step in steps:
            if jax.process_index():
                break
            place = self.directory.parent / DAMAGED
            place.mkdir(parents=True, exist_ok=True)
            taken = {path.name for path in place.iterdir()}
            names = (str(step), *(f"{step}-{number}" for number in range(2, len(taken) + 3)))
            target = place / next(name for name in names if name not in taken)
            (self.directory / str(step)).rename(target)
            warn(f"damaged checkpoint {step} was moved to {target}")
        if steps:
            processes.gather(None)  # Waits until process 0 has moved them.
            self._manager.reload()

    def _write_error(self, error: Exception) -> UserError:
        steps = self.steps()
        last = f"the last good one is step {steps[-1]}" if steps else "no earlier one exists"
        return UserError(f"the checkpoint could not be written to {self.directory} ({first_line(error)}); {last}")


def record_files(directory: epath.Path, steps: list[int], *, fresh: int) -> None:
    """Writes sizes.json for the checkpoints in `steps`; hashes only the files of `fresh` and of unrecorded steps."""
    known = _read_sizes(directory)
    recorded = {str(step): known.get(str(step)) for step in steps if step != fresh}
    sizes = {str(step): recorded.get(str(step)) or _measure(directory / str(step)) for step in steps}
    temporary = directory.parent / (SIZES + ".tmp")
    temporary.write_text(json.dumps(sizes, indent=1) + "\n")
    temporary.replace(directory.parent / SIZES)


def check_files(directory: epath.Path, step: int, *, part: str = "") -> None:
    """Raises ValueError naming a file whose size, or whose hash if its name starts with `part`, has changed."""
    recorded = _read_sizes(directory).get(str(step))
    if recorded is None:  # The run was killed between finishing the checkpoint and recording it.
        return
    paths = _files(directory / str(step))
    hashes = {}
    for name, entry in recorded.items():
        # Earlier versions recorded only the size.
        wanted, hashes[name] = entry if isinstance(entry, list) else (entry, None)
        size = paths[name].stat().length if name in paths else 0
        if size != wanted:
            raise ValueError(f"{name} has {size} bytes, not {wanted}")
    checked = [name for name, digest in hashes.items() if digest and name.startswith(part)]
    for name, digest in _hashes({name: paths[name] for name in checked}).items():
        if digest != hashes[name]:
            raise ValueError(f"{name} does not match its recorded hash")


def _measure(directory: epath.Path) -> Files:
    paths = _files(directory)
    return {name: (paths[name].stat().length, digest) for name, digest in _hashes(paths).items()}


def _files(directory: epath.Path, inside: str = "") -> dict[str, epath.Path]:
    """Every file below a directory, by its relative name."""
    files: dict[str, epath.Path] = {}
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            files |= _files(path, f"{inside}{path.name}/")
        else:
            files[inside + path.name] = path
    return files


def _hashes(paths: dict[str, epath.Path]) -> dict[str, str]:
    """BLAKE2b hashes of files, by name; files are read in parallel and in chunks."""

    def digest(path: epath.Path) -> str:
        state = hashlib.blake2b(digest_size=16)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                state.update(chunk)
        return state.hexdigest()

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
    """Stage directory and step of `runs/a/sft` (its latest) or `runs/a/sft@300`; `UserError` if there is none."""
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
    steps = finished_steps(directory)
    if not steps:
        raise UserError(f"no checkpoint in {directory / CHECKPOINTS}: the run has not reached its first one yet")
    if wanted and (not wanted.isdecimal() or int(wanted) not in steps):
        raise UserError(f"no checkpoint {wanted} in {directory}: there are {', '.join(map(str, steps))}")
    return directory, int(wanted) if wanted else steps[-1]


def load_params(directory: Path, step: int, abstract: Any) -> Any:
    """The parameters of one checkpoint, in the shapes and shardings of `abstract`."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    checkpoints = epath.Path(directory) / CHECKPOINTS
    with ocp.StandardCheckpointer() as reader:
        try:
            check_files(checkpoints, step, part="params/")
            return reader.restore(_absolute(checkpoints / str(step) / "params"), abstract)
        except Exception as error:  # Orbax raises plain Exception if bytes of an array are missing.
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
        except Exception as error:  # Orbax raises plain Exception if bytes of an array are missing or shapes differ.
            raise UserError(
                f"the optimizer state of {directory}@{step} cannot be restored for this experiment "
                f"({first_line(error)}): leave out --warm_optimizer"
            ) from error


def write_experiment(directory: Path, experiment: Any) -> None:
    """Writes experiment.json atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / (EXPERIMENT + ".tmp")
    value = {"format": FORMAT, **to_json(experiment)}
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(directory / EXPERIMENT)


def read_experiment(directory: Path, cls: type) -> Any:
    """Reads experiment.json; raises `UserError` if it is missing or damaged."""
    try:
        value = json.loads((directory / EXPERIMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / EXPERIMENT} cannot be read: {first_line(error)}") from None
    return from_json(cls, upgraded(value, directory / EXPERIMENT) if isinstance(value, dict) else value)


def check_same(directory: Path, experiment: Any, allowed: tuple[str, ...]) -> None:
    """Raises `UserError` if `directory` holds an experiment that differs in fields that are not in `allowed`."""
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
    """Adds shardings to shapes and types: the `abstract` argument of a restore."""
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placements)


def _absolute(path: Any) -> Any:
    return epath.Path(Path(path).absolute())
