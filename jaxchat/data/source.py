"""Sources of documents or conversations, and the interface of a kind of source."""

import codecs
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxchat.data.cache import Log
from jaxchat.errors import UserError

Split = Literal["train", "val"]
Content = Literal["documents", "objects"]
"""What is read from a source: texts, or objects that become conversations or problems."""
Object = tuple[int, Any]
"""An object's number, counted from 1 in its file or part, and its value; `Kind.location` makes it a location."""
Item = TypeVar("Item")
MISSING = object()
TRAIN, VAL, TEST = {"train", "training"}, {"val", "valid", "validation", "dev"}, {"test"}  # words in file names


@dataclass(frozen=True)
class Source:
    """One file, or one generator, of documents or objects. `kind` names a row of `KINDS`."""

    kind: str
    path: str
    size: int  # bytes on disk, or approximate bytes generated


@dataclass
class Reading:
    """How one reader reads a source, which part of it, and its progress."""

    text_column: str = "text"
    encoding: str = "utf-8"
    part: int = 0
    parts: int = 1
    """Number of readers that share the source; together they read everything once."""
    fraction: float = 0.0
    """Share of this part that has been read."""

    def __post_init__(self) -> None:
        try:
            b"a".decode(self.encoding)
        except UnicodeError:  # The encoding exists, but needs more than one byte per character.
            pass
        except LookupError:
            problem = f"--data.encoding={self.encoding} is not a text encoding of Python; use one, such as latin-1"
            raise UserError(problem) from None

    @cached_property
    def is_utf8(self) -> bool:
        """Whether the encoding is UTF-8, with or without a byte order mark."""
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")

    def advance(self, done: int, total: int) -> None:
        """Sets `fraction` to the share `done` of `total`, in any unit."""
        self.fraction = done / max(total, 1)

    def deal(self, total: int) -> Iterator[int]:
        """Yields this part's share of the numbers below `total`."""
        for i in range(self.part, total, self.parts):
            yield i
            self.advance(i, total)


class Kind:
    """A kind of source: how it is found, read, split into shards and identified. The defaults are those of files.

    A kind overrides `objects`, from which `documents` takes the text column, or `documents`, or both; one with a
    prefix overrides `find`.
    """

    mark: str
    """The prefix of a spec, with its colon, or the suffix of a file, with its dot."""
    contents: tuple[Content, ...] = ("documents", "objects")
    shuffled = False
    """Whether documents come in random order, so that the first are a sample."""
    shard_bytes = 32 << 20
    """Bytes of a source that make one shard of rows."""
    conversations = 3
    """Version of how conversations become rows; increase it when the same conversations would make different rows."""

    def find(
        self, spec: str, split: Split, content: Content, downloads: Path | None, log: Log
    ) -> Sequence[Source | Path]:
        """The sources, or the files, that a spec with the prefix names. Raises `UserError` if the spec is wrong."""
        raise NotImplementedError

    def objects(self, source: Source, reading: Reading, columns: list[str] | None = None) -> Iterator[Object]:
        """Yields the objects of a part in a fixed order; a kind with columns reads only `columns`."""
        raise NotImplementedError

    def documents(self, source: Source, reading: Reading) -> Iterator[str]:
        """Yields the documents of a part in a fixed order."""
        column = reading.text_column
        for number, row in self.objects(source, reading, [column]):
            text = cell(row, column)
            # A null is a document without text. So is NaN, which other programs write instead.
            if text is None or text != text:
                text = ""
            if not isinstance(text, str):
                raise UserError(f"{self.location(source, reading, number)} {_no_text(row, column)}")
            yield text

    def location(self, source: Source, reading: Reading, number: int) -> str:
        """The location of an object, such as `pages.jsonl line 3`."""
        return f"{source.path} row {number}"

    def most_parts(self, reading: Reading) -> int:
        """The largest number of readers that may share a source."""
        return sys.maxsize

    def hash(self, source: Source) -> str:
        """Hexadecimal SHA-256 of what determines the content."""
        with open(source.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def by_words(files: Sequence[tuple[str, Item]], val: Set[str] = VAL) -> tuple[list[Item], list[Item]]:
    """Training and validation files among (path, file) pairs, by the words in their paths, those of `val` or TRAIN.

    Files of a word for test belong to neither; if a path has a word for training, only such files are for training.
    """
    words = [(set(re.split("[^a-z]+", path.lower())), file) for path, file in files]
    others = [(found, file) for found, file in words if not found & (VAL | TEST)]
    train = [file for found, file in others if found & TRAIN] or [file for _, file in others]
    return train, [file for found, file in words if found & val]


def cell(row: Any, column: str) -> Any:
    """The value in a column of a row, or in a field of a column of objects, named COLUMN.FIELD; MISSING if there is
    none. A field of null is null."""
    value = row if isinstance(row, dict) else MISSING
    while isinstance(value, dict):
        if column in value:
            return value[column]
        name, _, column = column.partition(".")
        value = value.get(name, MISSING) if column else MISSING
    return None if value is None else MISSING


def columns(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names by which `cell` finds the values of a row."""
    for name, value in row.items():
        yield from columns(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]


def no_column(column: str, names: Iterable[str]) -> str:
    """Error message for a row with the columns `names` but without `column`."""
    names = list(names)
    near = next((f"={name}" for name in names if name.endswith(f".{column}")), " to the text column")
    return (
        f"has no column {column!r} (it has {', '.join(names) or 'none'}); set --data.text_column{near}, "
        "or read conversations with --data.format=chat"
    )


def _no_text(row: Any, column: str) -> str:
    if not isinstance(row, dict):
        return f"is not an object with a text column {column!r}"
    value = cell(row, column)
    if value is MISSING:
        return no_column(column, columns(row))
    names = {"bytes": "bytes", "list": "a list", "dict": "an object"}
    found = names.get(type(value).__name__, "a number")
    return f"has no text in column {column!r} but {found}; write it as text, or set --data.text_column to another"
