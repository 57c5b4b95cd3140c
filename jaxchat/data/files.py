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

from jaxchat.data.source import Content, Kind, Object, Reading, Source
from jaxchat.errors import UserError, first_line, missing

DEAL = 256  # consecutive lines that go to the same reader, in a file that every reader reads from the beginning
MOST_DEALT = 8  # maximum readers of such a file


_JSON_SPACE = " \t\r\n"
_ARRAY = "an array instead of an object; if the whole file is a JSON array, name it .json"
FIRST_BYTES = {
    b"\x1f\x8b": (
        "is compressed with gzip: name it .jsonl.gz if it has JSON lines, or unpack it, as gunzip <FILE >NEW does",
        ".jsonl.gz",
    ),
    b"PAR1": ("is a parquet file: name it .parquet", ".parquet"),
    b"PK\x03\x04": ("is a zip archive: unpack it with unzip", ""),
    b"\x28\xb5\x2f\xfd": ("is compressed with zstandard: unpack it, as unzstd <FILE >NEW does", ""),
    b"\xfd7zXZ": ("is compressed with xz: unpack it, as unxz <FILE >NEW does", ""),
    b"BZh9": ("is compressed with bzip2: unpack it, as bunzip2 <FILE >NEW does", ""),
    b"ARROW1": ("is an Arrow file: write it as parquet", ""),
}
"""By the first bytes of a file: what it is and what to do about it, and the mark of the kind that reads it."""


def misnamed(head: bytes, mark: str) -> str | None:
    """What is wrong with a file of the kind `mark` that begins with `head`, as the rest of a sentence."""
    return next(
        (advice for magic, (advice, own) in FIRST_BYTES.items() if head.startswith(magic) and own != mark), None
    )


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
    """A JSON array, or JSON objects one after another, on a line each or on several."""

    mark = ".json"

    def objects(self, source: Source, reading: Reading, columns: list[str] | None = None) -> Iterator[Object]:
        if reading.part:
            return
        text = _decode(Path(source.path).read_bytes(), source.path, reading).strip(_JSON_SPACE)
        decoder, position, number = json.JSONDecoder(), 0, 0
        try:
            if text.startswith("["):
                yield from enumerate(json.loads(text), 1)
                position = len(text)
            while position < len(text):
                value, end = decoder.raw_decode(text, position)
                number, position = number + 1, len(text) - len(text[end:].lstrip(_JSON_SPACE))
                yield number, value
        except (ValueError, RecursionError) as error:
            reason = _not_json(text, error, is_line=False)
            raise UserError(f"{source.path} is neither a JSON array nor JSON objects: {reason}") from None
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
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                where = self.location(source, reading, number)
                raise UserError(f"{where} is not valid JSON: {_not_json(line, error, is_line=True)}") from None
            if isinstance(value, list):
                raise UserError(f"{self.location(source, reading, number)} is {_ARRAY}")
            yield number, value

    def location(self, source: Source, reading: Reading, number: int) -> str:
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
                stored.seek(0)
                packed = stored.read(2) == b"\x1f\x8b"
                remedy = "download or make it again" if packed else "name it .jsonl if it has JSON lines"
                raise UserError(f"{source.path} is not a complete gzip file ({error}); {remedy}") from None
            except UnicodeError as error:
                raise UserError(_not_decoded(source.path, reading, error)) from None


class CompressedJsonLines(JsonLines):
    """JSON lines compressed with gzip; each reader decompresses the file from the beginning."""

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
            raise missing(f"reading {source.path} needs pyarrow", "hub") from None
        try:
            with open(source.path, "rb") as stored, pq.ParquetFile(stored) as file:
                names = file.schema_arrow.names
                # The text may be a field of a column.
                is_flat = columns is not None and len(columns) == 1 and columns[0] not in names
                unread = dict.fromkeys(_flat(file.schema_arrow) if is_flat else names)
                leaves = None if columns is None else _leaves(file, columns)
                before = 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if group % reading.parts == reading.part:
                        table = file.read_row_group(group, columns=leaves)
                        while is_flat and any(map(pa.types.is_struct, table.schema.types)):
                            table = table.flatten()
                        read = table.to_pylist() if table.num_columns else [{}] * rows
                        yield from ((i, unread | _without_nulls(row)) for i, row in enumerate(read, before + 1))
                        reading.advance(group + 1, file.num_row_groups)
                    before += rows
        except UnicodeDecodeError as error:
            where = f"in column {columns[0]!r} " if columns and len(columns) == 1 else ""
            raise UserError(
                f"{source.path} rows {before + 1:,} to {before + rows:,} hold text {where}that is not UTF-8 "
                f"({error.reason}); write the file again in UTF-8"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{source.path} is not a complete parquet file ({first_line(error)}); download or make it again"
            ) from None
        except (ValueError, ArithmeticError, LookupError) as error:  # of times that Python has no value for
            raise UserError(
                f"{source.path} rows {before + 1:,} to {before + rows:,} hold a value that cannot be read "
                f"({first_line(error)}); write the file again without columns of times and dates"
            ) from None


def _flat(fields: Any, prefix: str = "") -> Iterator[str]:
    """The names of columns, or of their fields, COLUMN.FIELD, if they hold objects."""
    for field in fields:
        name, kind = f"{prefix}{field.name}", field.type
        yield from _flat(kind, f"{name}.") if str(kind).startswith("struct") and kind.num_fields else [name]


def _leaves(file: Any, columns: list[str]) -> list[str]:
    """Paths of the leaves of columns of a parquet file, without times and dates, which no text is made of."""
    within = tuple(f"{column}." for column in columns)
    kinds = [kind for column in file.schema_arrow for kind in _kinds(column.type)]
    return [
        leaf.path
        for leaf, kind in zip(file.schema, kinds, strict=True)
        if (leaf.path in columns or leaf.path.startswith(within))
        and not kind.startswith(("timestamp", "date", "time", "duration"))
    ]


def _kinds(kind: Any) -> Iterator[str]:
    """The types of the leaves of an Arrow type, in the order of parquet's leaves."""
    kind = getattr(kind, "storage_type", kind)  # of an extension
    if not kind.num_fields:
        yield str(kind)
    for i in range(kind.num_fields):
        yield from _kinds(kind.field(i).type)


def _without_nulls(value: Any) -> Any:
    """A value without the null fields of objects: a parquet column has every field that one of its rows has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


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


def _not_json(text: str, error: Exception, *, is_line: bool) -> str:
    """Why a text, from the beginning of a line or value, is not JSON."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, json.JSONDecodeError):  # of an integer of thousands of digits
        return f"{first_line(error).partition(';')[0]}; write it as a string"
    if is_line and text.lstrip().startswith("["):
        return _ARRAY
    if is_line and text.lstrip().startswith("{") and error.pos >= len(text.rstrip()):
        return f"the object does not end in this line ({error}); name the file .json if its objects span lines"
    return str(error)


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
        raise UserError(_zeros(path, data, position))
    return text.removeprefix("\ufeff")


def _not_decoded(path: str, reading: Reading, error: UnicodeError, position: int | None = None) -> str:
    """Error message for bytes from `position` on, or from an unknown position, that are not in the encoding."""
    where, reason = "", str(error)
    if isinstance(error, UnicodeDecodeError):
        reason = error.reason
        if position is not None:
            if reading.is_utf8 and 0 in error.object[:4096]:
                return _zeros(path, error.object, position)
            where = f" at byte {position + error.start:,} (0x{error.object[error.start]:02x})"
    return f"{path} is not {reading.encoding}{where}: {reason}; set --data.encoding to its encoding, such as latin-1"


def _zeros(path: str, data: bytes, position: int) -> str:
    """Error message for bytes from `position` on with zeros among them: UTF-16, a stray zero, or no text."""
    first = position + data.index(0)
    even, odd = (data[(position + i) % 2 :: 2].count(0) for i in range(2))
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    if marked or (max(even, odd) > 0.1 * len(data) > 1 and 10 * min(even, odd) < max(even, odd)):
        encoding = "utf-16" if marked else "utf-16-le" if odd > even else "utf-16-be"
        return f"{path} looks like {encoding.upper()} text: set --data.encoding={encoding}"
    controls = sum(data.count(byte) for byte in range(32) if byte not in b"\t\n\v\f\r\x1b")
    if controls < 0.02 * len(data) or not data.strip(b"\0\r\n"):  # The latter is what a power cut leaves.
        where = f"at byte {first:,}, in line {_lines_before(path, first + 1):,}"
        return f"{path} has a zero byte {where}, which no text has: remove it, as tr -d '\\0' <FILE >NEW does"
    return f"{path} looks like a binary file (zero byte at offset {first:,}); if it is text, set --data.encoding"
