"""Files of an export: safetensors in pieces, JSON, and a directory that appears whole or not at all."""

import contextlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxchat.errors import UserError, first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
DTYPES: Mapping[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@contextlib.contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A place to write to that becomes `directory` at the end; `UserError` where something is there already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is there already: give --out a new or empty directory")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise UserError(f"{directory} cannot be made: {first_line(error)}") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(directory: Path, arrays: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int = SHARD_BYTES) -> int:
    """Safetensors files of at most `shard_bytes` (or one array), with an index where there are several.

    Holds one file's arrays at a time. Returns the number of values written.
    """
    save = _safetensors("safetensors.numpy").save_file
    piece: dict[str, np.ndarray] = {}
    number: dict[str, int] = {}
    bytes_in_all, values, pieces = 0, 0, 1

    def close() -> None:
        save(piece, directory / f"piece-{pieces}", metadata={"format": "pt"})
        piece.clear()

    for name, array in arrays:
        if piece and sum(held.nbytes for held in piece.values()) + array.nbytes > shard_bytes:
            close()
            pieces += 1
        piece[name], number[name] = array, pieces
        bytes_in_all, values = bytes_in_all + array.nbytes, values + array.size
    close()
    if pieces == 1:
        (directory / "piece-1").rename(directory / WEIGHTS)
        return values
    names = {i: f"model-{i:05d}-of-{pieces:05d}.safetensors" for i in range(1, pieces + 1)}
    for i, name in names.items():
        (directory / f"piece-{i}").rename(directory / name)
    weight_map = {name: names[i] for name, i in number.items()}
    write_json(directory / INDEX, {"metadata": {"total_size": bytes_in_all}, "weight_map": weight_map})
    return values


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """Every array of a directory's safetensors files, in float32.

    Raises:
        UserError: there are none, or one is missing or damaged.
    """
    safetensors = _safetensors("safetensors")
    if (directory / INDEX).is_file():
        names = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
    else:
        names = [WEIGHTS]
    found: dict[str, np.ndarray] = {}
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"no {name} in {directory}: only safetensors are read")
        try:
            with safetensors.safe_open(directory / name, "numpy") as file:
                found |= {key: np.asarray(file.get_tensor(key), np.float32) for key in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{directory / name} cannot be read: {first_line(error)}") from None
    return found


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; `UserError` where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no object")
    return value


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError("this needs safetensors: pip install safetensors") from None
