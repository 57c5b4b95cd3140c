"""Files of an export: safetensors, JSON, and directories that are created atomically."""

import contextlib
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxchat import signals
from jaxchat.errors import UserError, first_line, missing

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' names of types; integers and eight-bit floats need scales.
FLOATS: Mapping[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_NAMES = {np.dtype(dtype): name for name, dtype in FLOATS.items()}
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
    """Writes a safetensors file, one array at a time; returns the number of values written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    shapes = {name: (array.shape, array.dtype) for name, array in ((name, arrays[name]) for name in arrays)}
    names, end = sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, name)), 0  # So that all are aligned.
    for name in names:
        shape, dtype = shapes[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (directory / WEIGHTS).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            np.ascontiguousarray(arrays[name]).tofile(file)
    return sum(math.prod(shape) for shape, _ in shapes.values())


class Weights(Mapping[str, np.ndarray]):
    """The arrays of a directory's weight files, one or several with an index, read each when it is asked for.

    `readers` are those of files with other names.

    Raises:
        UserError: a file is missing, damaged or not what the index says, or an array is not finite or not of floats.
    """

    def __init__(self, directory: Path, readers: "Readers | None" = None) -> None:
        self._directory = directory
        self._readers: Readers = readers or {}
        if readers is not None:
            return
        form, files = _weight_files(directory)
        for name, indexed in files.items():
            found = form.open(directory / name)
            if indexed is not None and (odd := sorted(indexed ^ found.keys())):
                raise UserError(
                    f"{directory / form.listed} does not match {name} in {odd[0]}: restore the files of one export"
                )
            self._readers |= found

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.read(name)
        with np.errstate(over="ignore"):
            wide = array.astype(np.float32, copy=False).reshape(-1)
            if not np.isfinite(np.vdot(wide, wide)):
                raise UserError(
                    f"{self._directory} has values that are not finite in float32 (NaN, infinity or squares beyond it) "
                    f"in {name}"
                )
        return array

    def read(self, name: str) -> np.ndarray:
        """An array as it is stored."""
        try:
            return self._readers[name]()
        except (OSError, ValueError) as error:
            raise UserError(f"{name} in {self._directory} cannot be read: {first_line(error)}") from None

    def add_prefix(self, prefix: str) -> None:
        """Gives all names a prefix if none has it: files that were saved without the head lack it."""
        if not any(name.startswith(prefix) for name in self._readers):
            self._readers = {prefix + name: reader for name, reader in self._readers.items()}

    def drop(self, pattern: str) -> list[str]:
        """Leaves out the arrays whose whole names match a regular expression; returns their names."""
        dropped = [name for name in self._readers if re.fullmatch(pattern, name)]
        for name in dropped:
            del self._readers[name]
        return dropped


Readers = dict[str, Callable[[], np.ndarray]]


def _open_safetensors(path: Path) -> Readers:
    """Checks the header with the library; reads without mapping the file, whose pages would count as memory."""
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy") as file:
            names = list(file.keys())
        with path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None

    def read(name: str) -> np.ndarray:
        entry = header[name]
        if (kind := entry["dtype"]) not in FLOATS:
            raise UserError(f"{path} has {name} of type {kind}: only unquantized weights can be imported")
        start, count = 8 + size + entry["data_offsets"][0], math.prod(entry["shape"])
        return np.fromfile(path, FLOATS[kind], count, offset=start).reshape(entry["shape"])

    return {name: functools.partial(read, name) for name in names}


def open_torch(path: Path) -> Readers:
    """Files of torch.save, which are pickles: only torch can read them without executing what they contain."""
    try:
        import torch
    except ImportError:
        raise missing(f"{path} is a file of PyTorch, which only torch can read safely", "interop") from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # Also what the unpickler and zip files raise.
        raise UserError(
            f"{path} cannot be read without executing code that it may contain ({first_line(error)}): copy it "
            "again if it is damaged, or save the model as safetensors where you trust it"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(one, torch.Tensor) for one in tensors.values()):
        raise UserError(f"{path} is not a state dict of tensors")

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise UserError(f"{path} has {name} of type {tensor.dtype}: only unquantized weights can be imported")
        if tensor.dtype == torch.bfloat16:
            return np.array(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
        return np.array(tensor.numpy())

    return {name: functools.partial(read, name) for name in tensors}


class Form(NamedTuple):
    """A format of weight files: names of a whole file and of its index, the end of shards' names, and the reader."""

    whole: str
    listed: str
    ending: str
    open: Callable[[Path], Readers]


FORMS = (
    Form(WEIGHTS, INDEX, "*.safetensors", _open_safetensors),
    Form("pytorch_model.bin", "pytorch_model.bin.index.json", "*.bin", open_torch),
)


def _weight_files(directory: Path) -> tuple[Form, dict[str, set[str] | None]]:
    """The weight files of a directory, each with the names that its index lists; None without an index."""
    there = [form for form in FORMS if any(directory.glob(form.ending)) or (directory / form.listed).is_file()]
    if not there:
        raise UserError(f"no {WEIGHTS} in {directory}: only safetensors files and pytorch_model.bin can be imported")
    form = there[0]
    index, whole_file = directory / form.listed, (directory / form.whole).is_file()
    if not index.is_file():
        if not whole_file:
            shard = min(path.name for path in directory.glob(form.ending))
            raise UserError(f"no {form.whole} in {directory}: {shard} needs its {form.listed}")
        return form, {form.whole: None}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise UserError(
            f"{index} has no weight_map of names to files: restore it, or import one {form.whole} without it"
        )
    files: dict[str, set[str] | None] = {
        name: {key for key, place in places.items() if place == name} for name in sorted(set(places.values()))
    }
    if whole_file and form.whole not in files:
        raise UserError(f"{directory} has both {form.whole} and {form.listed}: remove the one that is out of date")
    if missing := [name for name in files if Path(name).name != name or not (directory / name).is_file()]:
        raise UserError(f"no {missing[0]} in {directory}, which {form.listed} names: restore the files of one export")
    return form, files


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
