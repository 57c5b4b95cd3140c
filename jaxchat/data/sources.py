"""Where documents come from: files, directories, globs, the tiny world and data sets of the hub.

    notes.txt               one document, the whole file
    pages.jsonl[.gz]        one document a line, the text column of its object
    pages.parquet           one document a row
    corpus/                 every such file in it, but for training none whose name or folder says val, valid,
                            validation, dev or test, and only those that say train where one does; for validation
                            those that say val, valid, validation or dev where one does
    "corpus/*.jsonl.gz"     every file that matches, ** included
    tinyworld:train[:N]     N documents of the tiny world, also tinyworld:val
    hub:fineweb-edu[:N]     N shards of a data set of the Hugging Face hub, see hub.py

A document is a str without lone surrogates. Every mistake in a file is a `UserError` that names file and place.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxchat.config import UserError, first_line
from jaxchat.tokenizer.sentencepiece import scalar_values

Split = Literal["train", "val"]
TINYWORLD_BYTES = 330  # of a document, about
DEAL = 256  # lines of a compressed file dealt to one part at a time
TRAIN, VAL, TEST = {"train", "training"}, {"val", "valid", "validation", "dev"}, {"test"}  # words in file names


@dataclass(frozen=True)
class Source:
    """One file, or one generator, of documents."""

    kind: str
    path: str
    size: int  # bytes on disk, or about as many as are generated

    def hash(self) -> str:
        """Hexadecimal SHA-256 of what the documents are made from."""
        if self.kind != "tinyworld":
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        from jaxchat.data import tinyworld

        code = sorted(Path(tinyworld.__file__).parent.glob("*.py"))
        return hashlib.sha256(b"\0".join([self.path.encode(), *(path.read_bytes() for path in code)])).hexdigest()


@dataclass(frozen=True)
class Reading:
    """How documents are read, and how far it got."""

    text_column: str = "text"
    encoding: str = "utf-8"
    part: int = 0
    parts: int = 1
    """Documents are dealt to `parts` readers; together they read every document once."""
    fraction: list[float] = field(default_factory=lambda: [0.0], compare=False)
    """One number: the share of this part that is read."""

    @property
    def is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")

    def advance(self, done: int, total: int) -> None:
        self.fraction[0] = done / max(total, 1)


def find(spec: str, split: Split, *, hub_directory: str | Path | None = None, log: Callable = print) -> list[Source]:
    """The sources that a spec names, in a fixed order; for a directory, those of the split."""
    if spec.startswith("tinyworld:"):
        return [Source("tinyworld", spec, _tinyworld(spec)[1] * TINYWORLD_BYTES)]
    if spec.startswith("hub:"):
        from jaxchat.data import hub

        if hub_directory is None:
            raise UserError(f"{spec} needs a cache directory to download to")
        return [_source(path) for path in hub.download(spec, split, Path(hub_directory), log=log)]
    path = Path(spec).expanduser()
    if path.is_dir():
        return _find_in_directory(path, split)
    if path.exists():
        return [_source(path)]
    if glob.has_magic(spec):
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not matches:
            raise UserError(f"no file matches --data.{split} {spec}")
        return [_source(Path(match)) for match in matches]
    raise UserError(f"--data.{split} {spec} does not exist")


def documents(source: Source, reading: Reading) -> Iterator[str]:
    """Every document of one part of a source, in a fixed order."""
    try:
        b"a".decode(reading.encoding)
    except UnicodeError:  # Such as one byte of an encoding of two.
        pass
    except LookupError:
        raise UserError(f"--data.encoding={reading.encoding} is not an encoding of text that Python knows") from None
    for text in READERS[source.kind](source, reading):
        yield scalar_values(text)


def held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out share: a function of its text alone, so of neither order nor file."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _find_in_directory(directory: Path, split: Split) -> list[Source]:
    known = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and _kind(path)
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]
    if not known:
        raise UserError(f"no {', '.join(SUFFIXES)} file in --data.{split} {directory}")
    words = {path: _words(path.relative_to(directory)) for path in known}
    if split == "val":
        chosen = [path for path in known if words[path] & VAL] or known
    else:
        free = [path for path in known if not words[path] & (VAL | TEST)]
        chosen = [path for path in free if words[path] & TRAIN] or free
    if not chosen:
        raise UserError(f"only validation and test files in --data.train {directory}, such as {known[0].name}")
    return [_source(path) for path in chosen]


def _words(path: Path) -> set[str]:
    return set(re.split("[^a-z]+", str(path).lower()))


def _kind(path: Path) -> str | None:
    return next((kind for suffix, kind in SUFFIXES.items() if path.name.lower().endswith(suffix)), None)


def _source(path: Path) -> Source:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{path} is none of {', '.join(SUFFIXES)}")
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not size:
        raise UserError(f"{path} is empty")
    return Source(kind, str(path), size)


def _read_text(source: Source, reading: Reading) -> Iterator[str]:
    if reading.part:
        return
    text = _decode(Path(source.path).read_bytes(), source.path, reading)
    yield text.removeprefix("\ufeff")
    reading.advance(1, 1)


def _read_jsonl(source: Source, reading: Reading) -> Iterator[str]:
    if not reading.is_utf8:
        yield from _read_objects(_dealt_lines(source, reading), source.path, reading)
        return
    start, stop = (source.size * part // reading.parts for part in (reading.part, reading.part + 1))
    with open(source.path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        # The lines before the start are counted only to name one in an error.
        yield from _read_objects(_lines_until(file, start, stop, reading), source.path, reading, skipped=start)


def _lines_until(file: Any, start: int, stop: int, reading: Reading) -> Iterator[tuple[int, int, bytes]]:
    number = 0
    position = file.tell()
    while position < stop and (line := file.readline()):
        number += 1
        yield number, position, line
        position += len(line)
        reading.advance(position - start, stop - start)


def _dealt_lines(source: Source, reading: Reading) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and UTF-8 of every line of this part of a file that can only be read from its beginning."""
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
            raise UserError(f"{source.path} is not a whole gzip file ({error}); fetch or pack it again") from None
        except UnicodeError as error:
            raise UserError(_not_decoded(source.path, reading.encoding, error)) from None


def _read_objects(
    lines: Iterable[tuple[int, int, bytes]], path: str, reading: Reading, *, skipped: int = 0
) -> Iterator[str]:
    for number, position, line in lines:
        if position == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", "strict" if reading.is_utf8 else "surrogatepass"))
            text = row[reading.text_column]
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(path, line, position, error)) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} line {_line(path, number, skipped)} {_mistake(line, error, reading)}") from None
        if not isinstance(text, str):
            raise UserError(f"{path} line {_line(path, number, skipped)} {_no_text(row, reading)}")
        yield text


def _read_parquet(source: Source, reading: Reading) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"reading {source.path} needs pyarrow: pip install 'jaxchat[hub]'") from None
    column = reading.text_column
    try:
        with pq.ParquetFile(source.path) as file:
            if column not in file.schema_arrow.names:
                raise UserError(f"{source.path} {_no_text(dict.fromkeys(file.schema_arrow.names), reading)}")
            before = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if group % reading.parts == reading.part:
                    values = file.read_row_group(group, columns=[column]).column(column)
                    for i, text in enumerate(values.to_pylist()):
                        if not isinstance(text, str):
                            raise UserError(f"{source.path} row {before + i + 1} has no text in column {column!r}")
                        yield text
                    reading.advance(group + 1, file.num_row_groups)
                before += rows
    except UnicodeDecodeError as error:
        place = f"{source.path} rows {before + 1:,} to {before + rows:,}"
        told = f"hold text in column {column!r} that is not UTF-8 ({error.reason})"
        raise UserError(f"{place} {told}; write the file again with texts of UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source.path} is not a whole parquet file ({first_line(error)}); fetch it again") from None


def _read_tinyworld(source: Source, reading: Reading) -> Iterator[str]:
    from jaxchat.data import tinyworld

    split, count = _tinyworld(source.path)
    for i in range(reading.part, count, reading.parts):
        yield tinyworld.document(split, i)
        reading.advance(i, count)


def _tinyworld(spec: str) -> tuple[Split, int]:
    """Split and number of documents of a spec."""
    from jaxchat.data import tinyworld

    match = re.fullmatch(r"tinyworld:(train|val)(?::(\d+))?", spec)
    if not match or match[2] == "0":
        raise UserError(f"{spec} is not tinyworld:train or tinyworld:val, with or without a number of documents")
    split: Split = "train" if match[1] == "train" else "val"
    return split, int(match[2] or tinyworld.DOCUMENTS[split])


READERS: dict[str, Callable[[Source, Reading], Iterator[str]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "jsonl.gz": lambda source, reading: _read_objects(_dealt_lines(source, reading), source.path, reading),
    "parquet": _read_parquet,
    "tinyworld": _read_tinyworld,
}
SUFFIXES = {".txt": "text", ".jsonl": "jsonl", ".jsonl.gz": "jsonl.gz", ".parquet": "parquet"}


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
        "if it is text in another encoding, name it, such as --data.encoding=latin-1"
    )


def _not_decoded(path: str, encoding: str, error: UnicodeError) -> str:
    told = str(error)
    if isinstance(error, UnicodeDecodeError):
        told = f"{error.reason} (0x{error.object[error.start]:02x})"
    return f"{path} is not {encoding}: {told}; correct --data.encoding"


def _binary(path: str, offset: int) -> str:
    return (
        f"{path} looks like a binary file (a zero at byte {offset:,}); "
        "if it is text, name its encoding, such as --data.encoding=utf-16"
    )


def _mistake(line: bytes, error: Exception, reading: Reading) -> str:
    if isinstance(error, KeyError | TypeError):
        return _no_text(json.loads(line), reading)
    return f"is not JSON ({error})"


def _no_text(row: Any, reading: Reading) -> str:
    if not isinstance(row, dict):
        return f"is no object with a text column {reading.text_column!r}"
    if reading.text_column in row:
        return f"has no text in column {reading.text_column!r}"
    names = ", ".join(row) or "none"
    return f"has no column {reading.text_column!r} (it has {names}); name the text with --data.text_column"


def _line(path: str, number: int, skipped: int) -> int:
    """The number of a line in its file, given its number after the first `skipped` bytes."""
    if not skipped:
        return number
    with open(path, "rb") as file:
        while skipped > 1 and (block := file.read(min(skipped - 1, 1 << 20))):
            number += block.count(b"\n")
            skipped -= len(block)
        return number + file.readline().count(b"\n")
