"""Kinds of files: text, JSON lines, JSON arrays and parquet.

A file that cannot be read raises `UserError` with its path and, if known, the line or row.
"""

import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxchat.data.source import Content, Kind, Object, Reading, Source, no_column
from jaxchat.errors import UserError, first_line

DEAL = 256  # consecutive lines that go to the same reader, in a file that every reader reads from the beginning
MOST_DEALT = 8  # maximum readers of such a file


class Text(Kind):
    """A file that is one document."""

    mark = ".txt"
    contents: tuple[Content, ...] = ("documents",)

    def documents(self, source: Source, reading: Reading) -> Iterator[str]:
        if reading.part == 0:
            yield _decode(Path(source.path).read_bytes(), source.path, reading)
            reading.advance(1, 1)

    def most_parts(self, reading: Reading) -> int:
        return 1


class Json(Kind):
    """A JSON array, or JSON lines, because many .json files contain those."""

    mark = ".json"
    contents: tuple[Content, ...] = ("objects",)

    def objects(self, source: Source, reading: Reading, columns: list[str] | None = None) -> Iterator[Object]:
        if reading.part:
            return
        text = _decode(Path(source.path).read_bytes(), source.path, reading)
        try:
            if text.lstrip().startswith("["):
                yield from enumerate(json.loads(text), 1)
            else:
                lines = enumerate(text.split("\n"), 1)
                yield from ((number, json.loads(line)) for number, line in lines if line.strip())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source.path} is neither a JSON array nor JSON lines ({error})") from None
        reading.advance(1, 1)

    def most_parts(self, reading: Reading) -> int:
        return 1


class JsonLines(Kind):
    """An object per line. Readers seek to their byte range in UTF-8; else each reads the file from the beginning."""

    mark = ".jsonl"
    compressed = False

    def objects(self, source: Source, reading: Reading, columns: list[str] | None = None) -> Iterator[Object]:
        lines = _lines_of_range if self._is_sought(reading) else self._dealt_lines
        for number, line in lines(source, reading):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.place(source, reading, number)} is not valid JSON ({error})") from None

    def place(self, source: Source, reading: Reading, number: int) -> str:
        before = _lines_before(source.path, _byte_range(source, reading)[0]) if self._is_sought(reading) else 0
        return f"{source.path} line {before + number}"

    def most_parts(self, reading: Reading) -> int:
        return sys.maxsize if self._is_sought(reading) else MOST_DEALT

    def _is_sought(self, reading: Reading) -> bool:
        return reading.is_utf8 and not self.compressed

    def _dealt_lines(self, source: Source, reading: Reading) -> Iterator[tuple[int, str]]:
        """Yields (number, text) of the lines of a part, read from the beginning of the file."""
        with open(source.path, "rb") as stored:
            file: Any = gzip.GzipFile(fileobj=stored) if self.compressed else stored
            lines = io.TextIOWrapper(file, "utf-8-sig" if reading.is_utf8 else reading.encoding, newline="\n")
            try:
                for i, line in enumerate(lines):
                    if (i // DEAL) % reading.parts == reading.part:
                        yield i + 1, line
                        reading.advance(stored.tell(), source.size)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                problem = f"{source.path} is not a complete gzip file ({error}); download or make it again"
                raise UserError(problem) from None
            except UnicodeError as error:
                raise UserError(_not_decoded(source.path, reading, error)) from None


class CompressedJsonLines(JsonLines):
    mark = ".jsonl.gz"
    shard_bytes = 12 << 20
    compressed = True


class Parquet(Kind):
    """An object per row; readers share the row groups."""

    mark = ".parquet"
    shard_bytes = 12 << 20

    def objects(self, source: Source, reading: Reading, columns: list[str] | None = None) -> Iterator[Object]:
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


def _byte_range(source: Source, reading: Reading) -> tuple[int, int]:
    """Byte range of a part; a line belongs to the part in which it starts."""
    start, stop = (source.size * part // reading.parts for part in (reading.part, reading.part + 1))
    return start, stop


def _lines_of_range(source: Source, reading: Reading) -> Iterator[tuple[int, str]]:
    """Yields (number within the range, text) of the lines of a part's byte range."""
    start, stop = _byte_range(source, reading)
    with open(source.path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        number, position = 0, file.tell()
        while position < stop and (line := file.readline()):
            number += 1
            yield number, _decode(line, source.path, reading, position)
            position += len(line)
            reading.advance(position - start, stop - start)


def _lines_before(path: str, start: int) -> int:
    """Number of lines that start before a byte."""
    number = position = 0
    with open(path, "rb") as file:
        while position < start:
            position += len(file.readline())
            number += 1
    return number


def _decode(data: bytes, path: str, reading: Reading, position: int = 0) -> str:
    """The text of bytes from `position` on, without a byte order mark. Raises `UserError` if they are not text."""
    try:
        text = data.decode(reading.encoding)
    except UnicodeError as error:
        raise UserError(_not_decoded(path, reading, error, position)) from None
    if reading.is_utf8 and "\0" in text:
        raise UserError(_binary(path, position + data.index(0)))
    return text.removeprefix("\ufeff")


def _not_decoded(path: str, reading: Reading, error: UnicodeError, position: int | None = None) -> str:
    """Error message for bytes from `position` on, or from an unknown position, that are not in the encoding."""
    where, reason = "", str(error)
    if isinstance(error, UnicodeDecodeError):
        reason = error.reason
        if position is not None:
            if reading.is_utf8 and 0 in error.object[:4096]:
                return _binary(path, position + error.object.index(0))
            where = f" at byte {position + error.start:,} (0x{error.object[error.start]:02x})"
    return f"{path} is not {reading.encoding}{where}: {reason}; set --data.encoding to its encoding, such as latin-1"


def _binary(path: str, offset: int) -> str:
    return (
        f"{path} looks like a binary file (zero byte at offset {offset:,}); "
        "if it is text, set its encoding, such as --data.encoding=utf-16"
    )
