"""Records of single answers, a JSON line each: what an evaluation that was stopped goes on from."""

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
    """The records of one task, by the question's number; a question is answered once, however often it is started.

    The first line says what is evaluated, and how. A last line that was cut off is written again. Without a path
    nothing is written.

    Raises:
        UserError: the file is that of another evaluation, or is damaged.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.about = json.loads(json_line(dict(about)))
        self.done: dict[int, dict[str, Any]] = {}
        self._file: io.BufferedRandom | io.BytesIO = io.BytesIO()
        if path is None:
            return
        self.path = path
        whole = self._read() if path.exists() else 0
        make_directory(path.parent, "--out")
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._write(self.about)

    def add(self, index: int, record: Mapping[str, Any]) -> None:
        """Keeps what came of a question."""
        made = json.loads(json_line({"index": index, **record}))
        self.done[index] = made
        self._write(made)

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
        """Reads what is there; returns how many bytes of it are whole lines."""
        *lines, _ = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
                if number > 1:
                    self.done[_index(value)] = value
            except ValueError:
                raise UserError(f"{self.path} line {number} is no record: remove the file to evaluate anew") from None
            if number == 1 and value != self.about:
                raise UserError(f"{self.path} is of another evaluation: remove it, or give this one its own --out")
        return sum(len(line) + 1 for line in lines)


def read_records(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """What was evaluated, and each question's record.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    try:
        about, *records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if "task" not in about:
            raise ValueError
        return about, {_index(record): record for record in records}
    except FileNotFoundError:
        raise UserError(f"there is no {path}: evaluate first") from None
    except (ValueError, TypeError):
        raise UserError(f"{path} holds no whole records of an evaluation: finish it first") from None


def _index(record: Any) -> int:
    """A record's number; raises ValueError for what is no record."""
    match record:
        case {"index": int(index), "right": bool()}:
            return index
    raise ValueError
