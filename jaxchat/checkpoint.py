"""Checkpoints with Orbax: asynchronous, atomic, restored under any mesh.

A stage directory holds experiment.json and checkpoints/<step>/{params, rest, facts}; decoding reads only `params`.
snapshots/checkpoints/<step>/ has parameters alone, kept over the whole run (`keep_params`). The tokenizer is one
directory up, so a run directory moves as one folder. A damaged checkpoint is recognised by sizes.json,
which has the size of its files and the hash of small ones, and by the checksums of its arrays, which are part of facts,
so that nothing is read twice. It is moved to checkpoints-damaged/ once an older one has been restored in its place.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxchat import integrity, processes, unnamed_owners
from jaxchat.data.cache import read_json, write_text
from jaxchat.errors import UserError, first_line
from jaxchat.integrity import all_finite
from jaxchat.paths import check_local, split_step, user_path
from jaxchat.serialization import difference, from_json, to_json
from jaxchat.upgrades import FORMAT, upgraded

EXPERIMENT = "experiment.json"
CHECKPOINTS = "checkpoints"
DAMAGED = "checkpoints-damaged"
SNAPSHOTS = "snapshots"
DTYPES = "dtypes"  # Entry of a checkpoint's facts: the types of its parameters, if not all are float32.


CHUNK = 64 << 20  # Bytes of the pieces that large arrays are written in by `save_by_array`, and read in.


class Checkpoints:
    """The checkpoints of one stage directory: the newest `keep` ones (None: all). Saves run in the background, one at a
    time."""

    def __init__(self, directory: Path | str, *, keep: int | None) -> None:
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = Path(directory) / CHECKPOINTS
        unnamed_owners.allow()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory.absolute(), options=options)
        except OSError as error:
            raise UserError(f"{self.directory} cannot be written: {first_line(error)}") from error
        self._thread = ThreadPoolExecutor(1)  # Records files after they are committed, in parallel with training.
        self._pending: list[Future[None]] = []  # The last save: committed and, in process 0, recorded.

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, facts: dict[str, Any] | None) -> None:
        """Starts writing `state`, a named tuple with a field `params`, and JSON `facts`, unless the step is saved.

        Without facts, only the parameters are written.
        """
        with self._writing():
            for pending in self._pending:
                pending.result()
            if step in self._manager.all_steps():
                return
            parts = {"params": state.params}
            if facts is not None:
                parts["rest"] = state._replace(params=None)._asdict()
            sums = {name: integrity.checksums(part) for name, part in parts.items()}
            items = ocp.args.Composite(
                **{name: ocp.args.StandardSave(part) for name, part in parts.items()},
                facts=ocp.args.JsonSave({**(facts or {}), integrity.CHECKSUMS: sums}),
            )
            self._manager.save(step, args=items)
        self._pending = [self._thread.submit(self._manager.wait_until_finished)]
        if jax.process_index() == 0:
            self._pending.append(self._thread.submit(self._record, step, self._pending[0]))

    def save_by_array(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Writes what `save` does, but waits, and takes the memory of one array where `save` takes that of all."""
        from orbax.checkpoint.experimental import v1

        whole, context = self.directory.parent.absolute() / "params", v1.Context()
        context.array.saving.storage_options.chunk_byte_size = CHUNK
        with self._writing():
            sums = {"params": integrity.checksums(state.params)}
            rest = state._replace(params=None)._asdict()
            sums["rest"] = integrity.checksums(rest)
            facts = {**facts, integrity.CHECKSUMS: sums}
            items = ocp.args.Composite(rest=ocp.args.StandardSave(rest), facts=ocp.args.JsonSave(facts))
            self._manager.save(step, args=items)
            self._manager.wait_until_finished()
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
                for key in reversed(path):
                    leaf = {key.key: leaf} if hasattr(key, "key") else (*[None] * key.idx, leaf)
                with context:
                    v1.partial.save(whole, leaf)
            v1.partial.finalize(whole)
            (whole / "state").rename(self.directory / str(step) / "params")
            shutil.rmtree(whole)
            integrity.record_files(self.directory, self.steps(), fresh=step)

    def wait(self) -> None:
        """Waits until the last save is committed; raises `UserError` if it could not be written."""
        with self._writing():
            for committed in self._pending[:1]:
                committed.result()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a failure to write a checkpoint into a `UserError`."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            problem = f"the checkpoint could not be written to {self.directory} ({first_line(error)})"
            last = f"the last good one is step {self.steps()[-1]}" if self.steps() else "no earlier one exists"
            raise UserError(f"{problem}; {last}: free some space and start again") from error

    def _record(self, step: int, committed: "Future[None]") -> None:
        if committed.exception() is None:
            integrity.record_files(self.directory, self.steps(), fresh=step)

    def restore(self, abstract: Any, warn: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Restores the newest readable checkpoint in the shapes and shardings of `abstract`: (step, state, facts).

        Returns None if there is no checkpoint. A damaged one is skipped with a warning, and moved aside once an older
        one is read. If all are damaged, raises `UserError` and moves none.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                processes.everyone(functools.partial(integrity.check_files, self.directory, step))
                read = processes.everyone(functools.partial(self._read, step, abstract))
                integrity.verify(facts := dict(read.facts), params=read.params, rest=read.rest)
            except (ValueError, OSError) as error:
                reason = first_line(error)
                warn(f"warning: checkpoint {step} in {self.directory} cannot be read ({reason}); trying an older one")
                continue
            self._move_aside([later for later in steps if later > step], warn)
            facts.pop(integrity.CHECKSUMS, None)
            return step, abstract._replace(**{**read.rest, "params": read.params}), facts
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
                return reader.restore((self.directory / str(step)).absolute(), args=items)
        except Exception as error:  # Orbax raises plain Exception if bytes of an array are missing.
            raise _unreadable(error, self.directory, step) from error

    def check(self) -> None:
        """Raises `UserError` if the last save has failed by now."""
        with self._writing():
            for pending in self._pending:
                if pending.done():
                    pending.result()

    def close(self) -> None:
        """Waits for pending writes and closes; raises `UserError` if a checkpoint could not be written."""
        with self._writing():
            try:
                for pending in self._pending:
                    pending.result()
            finally:
                self._thread.shutdown()
                self._manager.close()  # It reports a failed write again.

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


def read_facts(directory: Path, step: int) -> dict[str, Any]:
    """The facts of a checkpoint in a stage directory; empty if there are none that can be read."""
    value = read_json(_home(directory, step) / CHECKPOINTS / str(step) / "facts" / "metadata")
    return value if isinstance(value, dict) else {}


def params_hash(directory: Path, step: int) -> str:
    """Hash of the parameters of a checkpoint in a stage directory: of its checksums, or else of its files."""
    directory = _home(directory, step)
    checkpoints, part = directory / CHECKPOINTS, "params/"
    recorded = integrity.read_sizes(checkpoints).get(str(step), {})
    hashes = {name: entry[1] for name, entry in recorded.items() if name.startswith(part) and isinstance(entry, list)}
    hashes = read_facts(directory, step).get(integrity.CHECKSUMS, {}).get("params") or hashes
    if not hashes:
        paths = integrity.files_of(checkpoints / str(step)).items()
        hashes = integrity.hashes({name: path for name, path in paths if name.startswith(part)})
    return hashlib.blake2b(json.dumps(hashes, sort_keys=True).encode(), digest_size=8).hexdigest()


def copy_params(directory: Path, step: int, target: Path) -> None:
    """Copies the parameters of a checkpoint to the stage directory `target`, by hard links if the file system can."""

    def link(source: str, copy: str) -> None:
        try:
            os.link(source, copy)
        except OSError:
            shutil.copy2(source, copy)

    shutil.rmtree(target, ignore_errors=True)
    source, copy = (place / CHECKPOINTS / str(step) / "params" for place in (_home(directory, step), target))
    shutil.copytree(source, copy, copy_function=link)
    integrity.record_files(target / CHECKPOINTS, [step], fresh=step)


def finished_steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in a stage directory, oldest first."""
    return sorted(int(path.name) for path in (directory / CHECKPOINTS).glob("*") if path.name.isdecimal())


def readable_steps(directory: Path) -> list[int]:
    """Steps of a stage directory whose parameters can be loaded: checkpoints and snapshots, oldest first."""
    return sorted({*finished_steps(directory), *finished_steps(directory / SNAPSHOTS)})


def _home(directory: Path, step: int) -> Path:
    """The directory whose `checkpoints` hold a step: a stage directory, or its snapshots."""
    return directory if (directory / CHECKPOINTS / str(step)).is_dir() else directory / SNAPSHOTS


def locate(path: str) -> tuple[Path, int]:
    """Stage directory and step of `runs/a/sft` (its latest) or `runs/a/sft@300`; `UserError` if there is none.

    A named step may also be a snapshot; the latest is one only where no whole checkpoint is left.
    """
    try:
        check_local("checkpoint", path)
    except ValueError as error:
        raise UserError(str(error)) from None
    name, wanted = split_step(path)
    directory, step = user_path(name), wanted.removeprefix("@")
    if not (directory / EXPERIMENT).is_file():
        inside = [p.parent.name for p in sorted(directory.glob(f"*/{EXPERIMENT}"))] if directory.is_dir() else []
        hint = (
            f"did you mean {directory / inside[-1]}?" if inside else "train first: python -m launch.train --config=..."
        )
        raise UserError(f"no checkpoint in {directory}: {hint}")
    steps = readable_steps(directory)
    if not steps:
        raise UserError(f"no checkpoint in {directory / CHECKPOINTS}: the run has not reached its first one yet")
    if wanted and (not step.isdecimal() or int(step) not in steps):
        raise UserError(f"no checkpoint {step or wanted} in {directory}: there are {', '.join(map(str, steps))}")
    return directory, int(step) if step else (finished_steps(directory) or steps)[-1]


def load_params(directory: Path, step: int, abstract: Any) -> Any:
    """The parameters of one checkpoint, in the shapes and shardings of `abstract`; `UserError` if one is not finite."""
    try:
        params = _load(directory, step, "params", abstract)
        if not jax.jit(all_finite)(params):
            raise ValueError("its parameters are not finite (NaN, infinity or squares beyond float32)")
        return params
    except ValueError as error:
        others = [f"{directory}@{other}" for other in reversed(readable_steps(directory)) if other != step]
        hint = f"; try {others[0]}" if others else ""
        raise UserError(f"checkpoint {step} in {directory} cannot be read: {error}{hint}") from error


def as_stored(directory: Path, step: int, abstract: Any) -> Any:
    """`abstract` parameters with the types in which a checkpoint stores them: float32, unless its facts list others."""
    types = read_facts(directory, step).get(DTYPES)
    if types is None:
        return abstract
    leaves, tree = jax.tree.flatten(abstract)
    return jax.tree.unflatten(tree, [leaf.update(dtype=dtype) for leaf, dtype in zip(leaves, types, strict=True)])


def load_arrays(directory: Path, step: int, shapes: Any) -> Any:
    """The parameters of a checkpoint as NumPy arrays in the stored types, with little more memory than they take.

    Checksums are not verified, because the callers compare the arrays with their source.
    """
    stored = as_stored(directory, step, shapes)
    stand_ins = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), stored)
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
    limit: Any = max(1.01 * largest / 1e9, 0.25)  # Gigabytes that are read at once; it must exceed the largest.
    path = (_home(directory, step) / CHECKPOINTS / str(step) / "params").absolute()
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler(restore_concurrent_gb=limit)) as reader:
            return reader.restore(path, args=ocp.args.StandardRestore(stand_ins))
    except Exception as error:  # As in `_load`.
        raise UserError(
            f"{path} cannot be read again ({first_line(error)}): free some space, and try once more"
        ) from None


def load_state(directory: Path, step: int, abstract: Any) -> Any:
    """The whole state of one checkpoint, in the shapes and shardings of the named tuple `abstract`."""
    rest = load_rest(directory, step, abstract, "remove that checkpoint to use an earlier one")
    return abstract._replace(**{**rest, "params": load_params(directory, step, abstract.params)})


def load_rest(directory: Path, step: int, abstract: Any, remedy: str) -> dict[str, Any]:
    """All of the state but the parameters, by name, like `load_state`; `remedy` ends the message of a `UserError`."""
    try:
        rest: dict[str, Any] = _load(directory, step, "rest", abstract._replace(params=None)._asdict())
        return rest
    except ValueError as error:
        problem = f"the state of {directory}@{step} cannot be restored ({first_line(error)})"
        raise UserError(f"{problem}: {remedy}") from error


def _load(directory: Path, step: int, part: str, abstract: Any) -> Any:
    """Reads one part of a checkpoint; raises ValueError if that fails."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    checkpoints = (_home(directory, step) / CHECKPOINTS).absolute()
    unnamed_owners.allow()
    stored = as_stored(directory, step, abstract) if part == "params" else abstract
    with ocp.StandardCheckpointer() as reader:
        try:
            integrity.check_files(checkpoints, step, part=f"{part}/")
            tree = reader.restore(checkpoints / str(step) / part, stored)
            integrity.verify(read_facts(directory, step), **{part: tree})
            return tree if stored is abstract else jax.tree.map(lambda x, like: x.astype(like.dtype), tree, abstract)
        except Exception as error:  # Orbax raises plain Exception if bytes of an array are missing or shapes differ.
            raise _unreadable(error, checkpoints, step) from error


def _unreadable(error: Exception, directory: Path, step: int) -> Exception:
    """A ValueError for damage, for which an older checkpoint is tried; too little memory is not damage."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        problem = f"there is too little memory for checkpoint {step} in {directory} ({first_line(error)})"
        return UserError(f"{problem}: use a larger device, or free some memory")
    return ValueError(first_line(error))


def write_experiment(directory: Path, experiment: Any) -> None:
    """Writes experiment.json atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    value = {"format": FORMAT, **to_json(experiment)}
    write_text(directory / EXPERIMENT, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_experiment(directory: Path, cls: type) -> Any:
    """Reads experiment.json; raises `UserError` if it is missing or damaged."""
    path, remedy = directory / EXPERIMENT, f"restore it, or remove {directory} to start again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "it is empty" if isinstance(error, ValueError) and not path.stat().st_size else first_line(error)
        raise UserError(f"{path} cannot be read ({reason}): {remedy}") from None
    return from_json(cls, upgraded(value, path) if isinstance(value, dict) else value)


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
