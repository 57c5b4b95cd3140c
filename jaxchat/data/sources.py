"""Finds and reads documents: files, directories, globs, the tiny world and data sets of the Hugging Face hub.

    notes.txt               one document, the whole file
    pages.jsonl[.gz]        one document per line, from the text column of its object
    pages.parquet           one document per row
    corpus/                 all such files in it, selected by the words in their paths. Training excludes val, valid,
                            validation, dev and test, and uses only train if a path has it. Validation uses only val,
                            valid, validation and dev if a path has one of them
    "corpus/*.jsonl.gz"     every file that matches; ** matches across directories
    tinyworld:train[:N]     N documents of the tiny world, also tinyworld:val
    hub:fineweb-edu[:N]     N shards of a data set of the hub, see hub.py

A document is a str without lone surrogates. A damaged file raises `UserError` with its path and, if known, the line.
Conversations come from the same places except .txt files, see conversations.py.
"""

import glob
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxchat.data import conversations
from jaxchat.data.files import Reading, Source, no_column, objects, place, read_text
from jaxchat.errors import UserError
from jaxchat.launcher import log
from jaxchat.tokenizer.sentencepiece import scalar_values

Split = Literal["train", "val"]
TINYWORLD_BYTES = 330  # per document, approximately
SUFFIXES: Mapping[str, str] = {".txt": "text", ".jsonl": "jsonl", ".jsonl.gz": "jsonl.gz", ".parquet": "parquet"}
TRAIN, VAL, TEST = {"train", "training"}, {"val", "valid", "validation", "dev"}, {"test"}  # words in file names


def find(
    spec: str,
    split: Split,
    *,
    suffixes: Mapping[str, str] = SUFFIXES,
    hub_directory: str | Path | None = None,
    log: Callable = log,
) -> list[Source]:
    """The sources that a spec names, in a fixed order; in a directory, the split's files with one of the suffixes."""
    if spec.startswith("tinyworld:"):
        if suffixes is conversations.SUFFIXES:
            return [conversations.tinyworld(spec, split)]
        return [Source("tinyworld", spec, _tinyworld(spec)[1] * TINYWORLD_BYTES)]
    if spec.startswith("hub:"):
        from jaxchat.data import hub

        if hub_directory is None:
            raise UserError(f"{spec} needs a cache directory to download to")
        return [_source(path, suffixes) for path in hub.download(spec, split, Path(hub_directory), log=log)]
    path = Path(spec).expanduser()
    if path.is_dir():
        return _find_in_directory(path, split, suffixes)
    if path.exists():
        return [_source(path, suffixes)]
    if glob.has_magic(spec):
        matches = sorted(match for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not matches:
            raise UserError(f"no file matches --data.{split} {spec}")
        return [_source(Path(match), suffixes) for match in matches]
    raise UserError(f"--data.{split} {spec} does not exist")


def documents(source: Source, reading: Reading) -> Iterator[str]:
    """Yields the documents of one part of a source in a fixed order."""
    for text in READERS[source.kind](source, reading):
        yield scalar_values(text)


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out, by a hash of its text: independent of order and file."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _find_in_directory(directory: Path, split: Split, suffixes: Mapping[str, str]) -> list[Source]:
    known = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and _kind(path, suffixes)
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    ]
    if not known:
        raise UserError(f"no {', '.join(suffixes)} file in --data.{split} {directory}")
    words = {path: words_of(path.relative_to(directory)) for path in known}
    if split == "val":
        chosen = [path for path in known if words[path] & VAL] or known
    else:
        others = [path for path in known if not words[path] & (VAL | TEST)]
        chosen = [path for path in others if words[path] & TRAIN] or others
    if not chosen:
        raise UserError(f"only validation and test files in --data.train {directory}, such as {known[0].name}")
    return [_source(path, suffixes) for path in chosen]


def words_of(path: Path) -> set[str]:
    """The lower-case words in a path, which tell the split of a file."""
    return set(re.split("[^a-z]+", str(path).lower()))


def _kind(path: Path, suffixes: Mapping[str, str]) -> str | None:
    return next((kind for suffix, kind in suffixes.items() if path.name.lower().endswith(suffix)), None)


def _source(path: Path, suffixes: Mapping[str, str]) -> Source:
    kind = _kind(path, suffixes)
    if kind is None:
        raise UserError(f"{path} has an unsupported suffix; expected one of: {', '.join(suffixes)}")
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not size:
        raise UserError(f"{path} is empty")
    return Source(kind, str(path), size)


def _read_objects(source: Source, reading: Reading) -> Iterator[str]:
    column = reading.text_column
    for number, row in objects(source, reading, [column]):
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{place(source, reading, number)} {_no_text(row, column)}")
        yield text


def _no_text(row: Any, column: str) -> str:
    if not isinstance(row, dict):
        return f"is not an object with a text column {column!r}"
    return f"has no text in column {column!r}" if column in row else no_column(column, row)


def _read_tinyworld(source: Source, reading: Reading) -> Iterator[str]:
    from jaxchat.data import tinyworld

    split, count = _tinyworld(source.path)
    for i in range(reading.part, count, reading.parts):
        yield tinyworld.document(split, i)
        reading.advance(i, count)


def _tinyworld(spec: str) -> tuple[Split, int]:
    """The split and number of documents of a spec."""
    from jaxchat.data import tinyworld

    match = re.fullmatch(r"tinyworld:(train|val)(?::(\d+))?", spec)
    if not match or match[2] == "0":
        raise UserError(f"{spec} is not tinyworld:train or tinyworld:val, or one of them with :N (N documents)")
    split: Split = "train" if match[1] == "train" else "val"
    return split, int(match[2] or tinyworld.DOCUMENTS[split])


READERS: dict[str, Callable[[Source, Reading], Iterator[str]]] = {
    "text": read_text,
    "jsonl": _read_objects,
    "jsonl.gz": _read_objects,
    "parquet": _read_objects,
    "tinyworld": _read_tinyworld,
}
