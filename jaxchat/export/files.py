"""Files of an export: safetensors, JSON, and directories that are created atomically."""

import contextlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxchat.errors import UserError, first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@contextlib.contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """Yields a temporary directory that becomes `directory` on success; raises `UserError` if that is not empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} already exists: set --out to a new or empty directory")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise UserError(f"{directory} cannot be created: {first_line(error)}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(directory: Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Writes a safetensors file; returns the number of values written."""
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    _safetensors("safetensors.numpy").save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})
    return sum(array.size for array in contiguous.values())


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a directory's safetensors files, one or several with an index, as float32.

    Raises:
        UserError: a file is missing or damaged.
    """
    safetensors = _safetensors("safetensors")
    if (directory / INDEX).is_file():
        names = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
    else:
        names = [WEIGHTS]
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"no {name} in {directory}: only safetensors files can be imported")
        try:
            with safetensors.safe_open(directory / name, "numpy") as file:
                arrays |= {key: np.asarray(file.get_tensor(key), np.float32) for key in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{directory / name} cannot be read: {first_line(error)}") from None
    return arrays


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises `UserError` if the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError("safetensors is not installed: pip install safetensors") from None
