"""Records of single answers as JSON lines, from which an interrupted evaluation resumes."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxchat.data.cache import make_directory
from jaxchat.errors import UserError
from jaxchat.serialization import json_line


class Records:
    """Records of one task by question number, appended to a file; `done` holds those already in the file.

    The first line is `about`: the task and the settings. An incomplete last line is removed. Without a path nothing is
    written.

    Raises:
        UserError: the file belongs to another evaluation, or is damaged.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.about = json.loads(json_line(dict(about)))
        self.done: dict[int, dict[str, Any]] = {}
        self._file: io.BufferedRandom | io.BytesIO = io.BytesIO()
        if path is None:
            return
        self.path = path
        size = self._read() if path.exists() else 0
        make_directory(path.parent, "--out")
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._write(self.about)

    def add(self, index: int, record: Mapping[str, Any]) -> None:
        """Adds the record of question `index` and appends it to the file."""
        value = json.loads(json_line({"index": index, **record}))
        self.done[index] = value
        self._write(value)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _write(self, value: Any) -> None:
        self._file.write(json_line(value).encode() + b"\n")
        self._file.flush()

    def _read(self) -> int:
        """Reads the file into `done`; returns the size of its complete lines in bytes."""
        *lines, _ = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
                if number > 1:
                    self.done[_index(value)] = value
            except ValueError:
                raise UserError(f"{self.path} line {number} is not a record: remove the file to start over") from None
            if number == 1 and value != self.about:
                raise UserError(f"{self.path} belongs to another evaluation: remove it, or set another --out")
        return sum(len(line) + 1 for line in lines)


def read_records(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Reads a records file: its first line and the records by question number.

    Raises:
        UserError: the file is missing, incomplete or damaged.
    """
    try:
        about, *records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if "task" not in about:
            raise ValueError
        return about, {_index(record): record for record in records}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run the evaluation first") from None
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged or incomplete: finish the evaluation first") from None


def _index(record: Any) -> int:
    """Question number of a record; raises ValueError if it is malformed."""
    match record:
        case {"index": int(index), "right": bool()}:
            return index
    raise ValueError
