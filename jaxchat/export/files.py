"""Files of an export: safetensors, JSON, and directories that are created atomically."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxchat import signals
from jaxchat.errors import UserError, first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names; integers and eight-bit floats need scales.
DTYPES: Mapping[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@contextlib.contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes `directory` on success; raises `UserError` if that is not empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} already exists: set --out to a new or empty directory")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = directory.parent / f".{directory.name}.{os.getpid()}"
        temporary.mkdir()  # With the mode that the umask gives.
    except OSError as error:
        raise UserError(f"{directory} cannot be created: {first_line(error)}") from None
    try:
        yield temporary
        signals.check()
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(directory: Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Writes a safetensors file with the mode of its directory; returns the number of values written."""
    from safetensors.numpy import save_file

    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(directory.stat().st_mode & 0o666)  # safetensors makes it 0600.
    return sum(array.size for array in contiguous.values())


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a directory's safetensors files, one or several with an index, as float32.

    Raises:
        UserError: a file is missing, damaged or not what the index says, or an array is not finite or not of floats.
    """
    import safetensors

    arrays: dict[str, np.ndarray] = {}
    for name, indexed in _weight_files(directory).items():
        try:
            with safetensors.safe_open(directory / name, "numpy") as file:
                found = set(file.keys())
                kinds = {key: file.get_slice(key).get_dtype() for key in found}
                if integer := sorted(key for key in found if kinds[key] not in FLOATS):
                    kind = f"{integer[0]} of type {kinds[integer[0]]}"
                    raise UserError(f"{directory / name} has {kind}: only unquantized weights can be imported")
                with np.errstate(over="ignore"):
                    arrays |= {key: np.asarray(file.get_tensor(key), np.float32) for key in found}
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{directory / name} cannot be read: {first_line(error)}") from None
        if indexed is not None and (odd := sorted(indexed ^ found)):
            raise UserError(f"{directory / INDEX} does not match {name} in {odd[0]}: restore the files of one export")
    with np.errstate(over="ignore"):
        bad = sorted(key for key, array in arrays.items() if not np.isfinite(np.square(array).sum()))
    if bad:
        listed = f"{bad[0]} and {len(bad) - 1} more" if bad[1:] else bad[0]
        raise UserError(
            f"{directory} has values that are not finite in float32 (NaN, infinity or squares beyond it) in {listed}"
        )
    return arrays


def _weight_files(directory: Path) -> dict[str, set[str] | None]:
    """The weight files of a directory, each with the names that its index lists; None without an index."""
    index, whole_file = directory / INDEX, (directory / WEIGHTS).is_file()
    if not index.is_file():
        if not whole_file:
            shards = sorted(path.name for path in directory.glob("*.safetensors"))
            found = f"{shards[0]} needs its {INDEX}" if shards else "only safetensors files can be imported"
            raise UserError(f"no {WEIGHTS} in {directory}: {found}")
        return {WEIGHTS: None}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise UserError(f"{index} has no weight_map of names to files: restore it, or import one {WEIGHTS} without it")
    files: dict[str, set[str] | None] = {
        name: {key for key, place in places.items() if place == name} for name in sorted(set(places.values()))
    }
    if whole_file and WEIGHTS not in files:
        raise UserError(f"{directory} has both {WEIGHTS} and {INDEX}: remove the one that is out of date")
    if missing := [name for name in files if Path(name).name != name or not (directory / name).is_file()]:
        raise UserError(f"no {missing[0]} in {directory}, which {INDEX} names: restore the files of one export")
    return files


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises `UserError` if the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
