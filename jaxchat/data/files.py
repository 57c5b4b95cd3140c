"""Kinds of files: text, JSON lines, JSON arrays and parquet.

A file that cannot be read raises `UserError` with its path and, if known, the line or row.
"""

import codecs
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
            yield _decode(Path(source.path).read_bytes(), source.path, reading).removeprefix("\ufeff")
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
        text = _decode(Path(source.path).read_bytes(), source.path, reading).removeprefix("\ufeff")
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
        for number, position, line in lines(source, reading):
            if position == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8", "strict" if reading.is_utf8 else "surrogatepass"))
            except UnicodeDecodeError as error:
                raise UserError(_not_utf8(source.path, line, position, error)) from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.place(source, reading, number)} is not valid JSON ({error})") from None

    def place(self, source: Source, reading: Reading, number: int) -> str:
        skipped = _byte_range(source, reading)[0] if self._is_sought(reading) else 0
        return f"{source.path} line {_line(source.path, number, skipped)}"

    def most_parts(self, reading: Reading) -> int:
        return sys.maxsize if self._is_sought(reading) else MOST_DEALT

    def _is_sought(self, reading: Reading) -> bool:
        return reading.is_utf8 and not self.compressed

    def _dealt_lines(self, source: Source, reading: Reading) -> Iterator[tuple[int, int, bytes]]:
        """Yields (number, offset, UTF-8 bytes) of the lines of a part, read from the beginning of the file."""
        with open(source.path, "rb") as stored:
            file: Any = gzip.GzipFile(fileobj=stored) if self.compressed else stored
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
                problem = f"{source.path} is not a complete gzip file ({error}); download or make it again"
                raise UserError(problem) from None
            except UnicodeError as error:
                raise UserError(_not_decoded(source.path, reading.encoding, error)) from None


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


def _lines_of_range(source: Source, reading: Reading) -> Iterator[tuple[int, int, bytes]]:
    """Yields (number within the range, offset, bytes) of the lines of a part's byte range."""
    start, stop = _byte_range(source, reading)
    with open(source.path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        number, position = 0, file.tell()
        while position < stop and (line := file.readline()):
            number += 1
            yield number, position, line
            position += len(line)
            reading.advance(position - start, stop - start)


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
