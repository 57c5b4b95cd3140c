"""Files of an export: safetensors shards, JSON, and directories that are created atomically."""

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


def write_weights(directory: Path, arrays: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes safetensors files of at most `shard_bytes` (or one array) each, with an index if there are several.

    Holds the arrays of one file in memory at a time. Returns the number of values written.
    """
    save = _safetensors("safetensors.numpy").save_file
    shard: dict[str, np.ndarray] = {}
    shard_of: dict[str, int] = {}
    total_bytes, values, shards = 0, 0, 1

    def close() -> None:
        save(shard, directory / f"piece-{shards}", metadata={"format": "pt"})
        shard.clear()

    for name, array in arrays:
        if shard and sum(other.nbytes for other in shard.values()) + array.nbytes > shard_bytes:
            close()
            shards += 1
        shard[name], shard_of[name] = array, shards
        total_bytes, values = total_bytes + array.nbytes, values + array.size
    close()
    if shards == 1:
        (directory / "piece-1").rename(directory / WEIGHTS)
        return values
    names = {i: f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)}
    for i, name in names.items():
        (directory / f"piece-{i}").rename(directory / name)
    weight_map = {name: names[i] for name, i in shard_of.items()}
    write_json(directory / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    return values


def read_weights(directory: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a directory's safetensors files as float32.

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
