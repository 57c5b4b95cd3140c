"""Records of single answers as JSON lines, from which an interrupted evaluation resumes."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxchat.data.cache import make_directory
from jaxchat.errors import UserError
from jaxchat.serialization import json_line


class Records:
    """Records of one task by question number, appended to a file; `done` holds those already in the file.

    The first line is `about`: the task and the settings. Of several records of a question the last counts. An
    incomplete last line is removed. Without a path nothing is written.

    Raises:
        UserError: the file belongs to another evaluation, or is damaged.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.about = json.loads(json_line(dict(about)))
        self.done, size = dict[int, dict[str, Any]](), 0
        self._file: io.BufferedWriter | io.BytesIO = io.BytesIO()
        if path is not None:
            if path.exists():
                known, self.done, size = _read(path)
                names = self.about.keys() - {"checkpoint"}  # Its parameters are compared; a run may be moved.
                if size and (other := sorted(key for key in names if known.get(key) != self.about[key])):
                    raise UserError(
                        f"{path} belongs to another evaluation (of other {', '.join(other)}): remove it, or set "
                        "another --out"
                    )
            make_directory(path.parent, "--out")
            self._file = open(path, "ab")  # noqa: SIM115
            self._file.truncate(size)
        if not size:
            self._write(self.about)

    def add(self, index: int, record: Mapping[str, Any]) -> None:
        """Adds the record of question `index` and appends it to the file."""
        value = json.loads(json_line({"index": index, **record}))
        self.done[index] = value
        self._write(value)

    def close(self) -> None:
        self._file.close()

    def _write(self, value: Any) -> None:
        self._file.write(json_line(value).encode() + b"\n")
        self._file.flush()


def read_records(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Reads a records file: its first line and the records by question number.

    Raises:
        UserError: the file is damaged or has no complete line.
    """
    about, records, size = _read(path)
    if not size:
        raise UserError(f"{path} has no records: run the evaluation again")
    return about, records


def _read(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]], int]:
    """The first line, the records by question number, and the size in bytes of the complete lines of a file."""
    *lines, _ = path.read_bytes().split(b"\n")
    about, records = dict[str, Any](), dict[int, dict[str, Any]]()
    for number, line in enumerate(lines, 1):
        try:
            match json.loads(line):
                case {"task": _} as about if number == 1:
                    pass
                case {"index": int(index), "right": bool()} as record if number > 1:
                    records[index] = record
                case _:
                    raise ValueError
        except ValueError:
            raise UserError(f"{path} line {number} is not a record: remove the file to start over") from None
    return about, records, sum(len(line) + 1 for line in lines)
