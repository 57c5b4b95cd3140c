"""Reads text files, and objects from JSON lines, JSON arrays and parquet.

An object comes with its number in the file, for error messages. A file that cannot be read raises `UserError` with its
path and, if known, the line or row.
"""

import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError, first_line

DEAL = 256  # consecutive lines of a compressed file that go to the same part
Object = tuple[int, Any]
"""An object's number, counted from 1 in its file or part, and its value; `place` turns the number into a location."""


@dataclass(frozen=True)
class Source:
    """One file, or one generator, of documents."""

    kind: str
    path: str
    size: int  # bytes on disk, or approximate bytes generated

    def hash(self) -> str:
        """Hexadecimal SHA-256 of the file, or of the spec and code of the generator."""
        if self.kind != "tinyworld":
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        from jaxchat.data import tinyworld

        is_chat = self.path.startswith("tinyworld:chat")
        files = Path(tinyworld.__file__).parent.glob("*.py")
        code = sorted(path for path in files if is_chat or path.name != "talk.py")  # talk.py generates no documents
        return hashlib.sha256(b"\0".join([self.path.encode(), *(path.read_bytes() for path in code)])).hexdigest()


@dataclass(frozen=True)
class Reading:
    """How one reader reads documents, which part of them, and its progress."""

    text_column: str = "text"
    encoding: str = "utf-8"
    part: int = 0
    parts: int = 1
    """Number of readers that share the documents; together they read each document once."""
    fraction: list[float] = field(default_factory=lambda: [0.0], compare=False)
    """Progress, as a list of one element: the share of this part that has been read."""

    def __post_init__(self) -> None:
        try:
            b"a".decode(self.encoding)
        except UnicodeError:  # The encoding exists, but needs more than one byte per character.
            pass
        except LookupError:
            problem = f"--data.encoding={self.encoding} is not a text encoding of Python; use one, such as latin-1"
            raise UserError(problem) from None

    @property
    def is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")

    def advance(self, done: int, total: int) -> None:
        self.fraction[0] = done / max(total, 1)


def read_text(source: Source, reading: Reading) -> Iterator[str]:
    """Yields the whole file as one text, to the first reader only."""
    if reading.part:
        return
    yield _decode(Path(source.path).read_bytes(), source.path, reading).removeprefix("\ufeff")
    reading.advance(1, 1)


def objects(source: Source, reading: Reading, columns: list[str] | None = None) -> Iterator[Object]:
    """Yields the objects of one part of a file in a fixed order; `columns` limits the columns read from parquet."""
    if source.kind == "parquet":
        return _read_parquet(source, reading, columns)
    if source.kind == "json":
        return _read_json(source, reading)
    if source.kind == "jsonl" and reading.is_utf8:
        return _read_jsonl(source, reading)
    return _parsed(_dealt_lines(source, reading), source, reading)


def place(source: Source, reading: Reading, number: int) -> str:
    """The location of an object, such as `pages.jsonl line 3`."""
    if source.kind == "jsonl" and reading.is_utf8:
        number = _line(source.path, number, _bounds(source, reading)[0])
    return f"{source.path} {'line' if source.kind in ('jsonl', 'jsonl.gz') else 'row'} {number}"


def _read_json(source: Source, reading: Reading) -> Iterator[Object]:
    """Yields the values of a JSON array, or of JSON lines, because many .json files contain those."""
    if reading.part:
        return
    text = _decode(Path(source.path).read_bytes(), source.path, reading).removeprefix("\ufeff")
    try:
        if text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), 1)
        else:
            lines = ((number, json.loads(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip())
            yield from lines
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source.path} is neither a JSON array nor JSON lines ({error})") from None
    reading.advance(1, 1)


def _bounds(source: Source, reading: Reading) -> tuple[int, int]:
    """Byte range of a part; a line belongs to the part in which it starts."""
    start, stop = (source.size * part // reading.parts for part in (reading.part, reading.part + 1))
    return start, stop


def _read_jsonl(source: Source, reading: Reading) -> Iterator[Object]:
    start, stop = _bounds(source, reading)
    with open(source.path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        yield from _parsed(_lines_until(file, start, stop, reading), source, reading)


def _lines_until(file: Any, start: int, stop: int, reading: Reading) -> Iterator[tuple[int, int, bytes]]:
    number = 0
    position = file.tell()
    while position < stop and (line := file.readline()):
        number += 1
        yield number, position, line
        position += len(line)
        reading.advance(position - start, stop - start)


def _dealt_lines(source: Source, reading: Reading) -> Iterator[tuple[int, int, bytes]]:
    """Yields (number, offset, UTF-8 bytes) of the lines of a part, for files that must be read from the beginning."""
    with open(source.path, "rb") as stored:
        file: Any = gzip.GzipFile(fileobj=stored) if source.kind == "jsonl.gz" else stored
        if not reading.is_utf8:
            text = io.TextIOWrapper(file, reading.encoding, newline="\n")
            file = (line.encode("utf-8", "surrogatepass") for line in text)
        position = 0
        try:
            for i, line in enumerate(file):
                if (i // DEAL) % reading.parts == reading.part:
                    yield i + 1, position, line
                    reading.advance(stored.tell(), source.size)
                position += len(line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{source.path} is not a complete gzip file ({error}); download or make it again") from None
        except UnicodeError as error:
            raise UserError(_not_decoded(source.path, reading.encoding, error)) from None


def _parsed(lines: Iterable[tuple[int, int, bytes]], source: Source, reading: Reading) -> Iterator[Object]:
    for number, position, line in lines:
        if position == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8", "strict" if reading.is_utf8 else "surrogatepass"))
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(source.path, line, position, error)) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place(source, reading, number)} is not valid JSON ({error})") from None


def _read_parquet(source: Source, reading: Reading, columns: list[str] | None) -> Iterator[Object]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"reading {source.path} needs pyarrow: pip install 'jaxchat[hub]'") from None
    try:
        with pq.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            for column in columns or ():
                if column not in names:
                    raise UserError(f"{source.path} {no_column(column, names)}")
            before = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if group % reading.parts == reading.part:
                    table = file.read_row_group(group, columns=columns)
                    yield from enumerate(table.to_pylist(), before + 1)
                    reading.advance(group + 1, file.num_row_groups)
                before += rows
    except UnicodeDecodeError as error:
        where = f"in column {columns[0]!r} " if columns else ""
        raise UserError(
            f"{source.path} rows {before + 1:,} to {before + rows:,} hold text {where}that is not UTF-8 "
            f"({error.reason}); write the file again in UTF-8"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{source.path} is not a complete parquet file ({first_line(error)}); download or make it again"
        ) from None


def no_column(column: str, names: Iterable[str]) -> str:
    """Error message for a row with the columns `names` but without `column`."""
    names = list(names)
    is_chat = "messages" in names or "conversations" in names
    remedy = "read conversations with --data.format=chat" if is_chat else "set --data.text_column to the text column"
    return f"has no column {column!r} (it has {', '.join(names) or 'none'}); {remedy}"


def _decode(data: bytes, path: str, reading: Reading) -> str:
    try:
        text = data.decode(reading.encoding)
    except UnicodeError as error:
        if reading.is_utf8 and isinstance(error, UnicodeDecodeError):
            raise UserError(_not_utf8(path, data, 0, error)) from None
        raise UserError(_not_decoded(path, reading.encoding, error)) from None
    if reading.is_utf8 and "\0" in text:
        raise UserError(_binary(path, data.index(0)))
    return text


def _not_utf8(path: str, data: bytes, position: int, error: UnicodeDecodeError) -> str:
    if 0 in data[:4096]:
        return _binary(path, position + data.index(0))
    return (
        f"{path} is not UTF-8 at byte {position + error.start:,} (0x{data[error.start]:02x}); "
        "if it is text in another encoding, set that, such as --data.encoding=latin-1"
    )


def _not_decoded(path: str, encoding: str, error: UnicodeError) -> str:
    reason = str(error)
    if isinstance(error, UnicodeDecodeError):
        reason = f"{error.reason} (0x{error.object[error.start]:02x})"
    return f"{path} is not {encoding}: {reason}; correct --data.encoding"


def _binary(path: str, offset: int) -> str:
    return (
        f"{path} looks like a binary file (zero byte at offset {offset:,}); "
        "if it is text, set its encoding, such as --data.encoding=utf-16"
    )


def _line(path: str, number: int, skipped: int) -> int:
    """Converts a line number counted after the first `skipped` bytes to the line number in the whole file."""
    if not skipped:
        return number
    with open(path, "rb") as file:
        while skipped > 1 and (block := file.read(min(skipped - 1, 1 << 20))):
            number += block.count(b"\n")
            skipped -= len(block)
        return number + file.readline().count(b"\n")
