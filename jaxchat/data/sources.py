"""Finds and reads documents, and objects that become conversations, from all kinds of sources.

    notes.txt               one document, the whole file
    pages.jsonl[.gz]        one document per line, from the text column of its object
    pages.parquet           one document per row
    corpus/                 all such files in it and in directories that it links to, by the words in their paths:
                            training excludes val, valid, validation, dev and test, and uses only train if a path has
                            it; validation uses only val, valid, validation and dev if a path has one of them
    "corpus/*.jsonl.gz"     every file that matches; ** matches across directories
    tinyworld:train[:N]     N documents of the tiny world, also tinyworld:val; tinyworld:chat[:N] has conversations
    hub:fineweb-edu[:N]     N shards of a data set of the hub, see hub.py

A document is a str without lone surrogates. A damaged file raises `UserError` with its path and, if known, the line.
Objects come from the same places except .txt files, see conversations.py. A .json file has an array of objects, or
objects on any number of lines; in a directory it is read for conversations only.
"""

import glob
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxchat.data import files, generated, hub
from jaxchat.data.cache import Log, read_json, write_json
from jaxchat.data.source import Content, Kind, Reading, Source, Split, by_words
from jaxchat.errors import UserError
from jaxchat.launcher import log
from jaxchat.paths import user_path
from jaxchat.tokenizer.sentencepiece import scalar_values

KINDS: Mapping[str, Kind] = {
    "text": files.Text(),
    "jsonl": files.JsonLines(),
    "jsonl.gz": files.CompressedJsonLines(),
    "parquet": files.Parquet(),
    "json": files.Json(),
    "tinyworld": generated.TinyWorld(),
    "hub": hub.Hub(),
}
SETTLED_SECONDS = 2.0
TEXT = "text"  # prefix of an entry text:... among conversations, and its format


def find(
    spec: str,
    split: Split,
    content: Content = "documents",
    *,
    downloads: Path | None = None,
    log: Log = log,
    note: Log | None = None,
) -> list[Source]:
    """The sources that a spec names, in a fixed order; in a directory, the split's files with such content.

    `note` is called with a message about files of a directory or glob that are not read.
    """
    for kind in KINDS.values():
        if kind.mark.endswith(":") and spec.startswith(kind.mark):
            found = kind.find(spec, split, content, downloads, log)
            break
    else:
        found = _find_files(spec, split, content, note or (lambda _: None))
    return [item if isinstance(item, Source) else _file(item, content) for item in found]


def documents(source: Source, reading: Reading) -> Iterator[str]:
    """Yields the documents of one part of a source in a fixed order."""
    return map(scalar_values, KINDS[source.kind].documents(source, reading))


def rows(spec: str, split: Split, *, downloads: Path | None = None) -> Iterator[tuple[str, Any]]:
    """Yields every object of the sources that a spec names, with its location. Raises `UserError` if there is none."""
    reading, number = Reading(), 0
    for source in find(spec, split, "objects", downloads=downloads):
        kind = KINDS[source.kind]
        for number, row in kind.objects(source, reading):
            yield kind.location(source, reading, number), row
    if not number:
        raise UserError(f"{spec} has no rows: check the file, or download it again")


def plain_or_gzipped(path: Path) -> Path | None:
    """A path, or else the path with .gz at its end, that is a file; None if neither is."""
    return next((found for found in (path, path.with_name(f"{path.name}.gz")) if found.is_file()), None)


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out, by a hash of its text: independent of order and file."""
    return _hash(text) < fraction * 2**64


def held_out_from(text: str) -> float:
    """The share above which `held_out` takes a document."""
    return _hash(text) / 2**64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest(), "big")


def content_hashes(sources: Sequence[Source], cache_directory: Path) -> list[str]:
    """Content hash of each source, in order. A file is hashed again only if its size, timestamps or inode changed."""
    path = cache_directory / "hashes.json"
    known = read_json(path) or {}
    now = time.time()

    def stamp_and_hash(source: Source) -> list[Any]:
        stamp = _stamp(source)
        cached = known.get(source.path, [])
        return cached if stamp and cached[:-1] == stamp else [*stamp, KINDS[source.kind].hash(source)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(stamp_and_hash, sources))
    settled = {
        source.path: entry
        for source, entry in zip(sources, found)
        # A file can change again within the resolution of the file system's clock without changing its timestamps.
        if (stamp := entry[:-1])
        and entry != known.get(source.path)
        and now - max(stamp[1], stamp[2]) / 1e9 > SETTLED_SECONDS
        and _stamp(source) == stamp
    }
    if settled:
        write_json(path, (read_json(path) or {}) | settled)
    return [entry[-1] for entry in found]


def _stamp(source: Source) -> list[int]:
    """What changes when a file does; empty if the source is not a file."""
    try:
        stat = os.stat(source.path)
    except FileNotFoundError:
        return []
    # Programs can set the modification time of a file, but not its change time (ctime).
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _find_files(spec: str, split: Split, content: Content, note: Log) -> list[Path]:
    path = user_path(spec)
    if path.is_dir():
        return _find_in_directory(path, split, content, note)
    if path.exists():
        return [path]
    if not glob.has_magic(spec):
        raise UserError(f"--data.{split} {spec} does not exist")
    found = sorted(glob.glob(str(path), recursive=True))
    matches = [Path(match) for match in found if Path(match).is_file()]
    if not matches:
        raise UserError(f"no file matches --data.{split} {spec}{' (only directories)' if found else ''}")
    if len(found) > len(matches) and "**" not in spec:
        note(f"{spec} matches {len(found) - len(matches)} directories or other entries, which are not read")
    return matches


def _find_in_directory(directory: Path, split: Split, content: Content, note: Log) -> list[Path]:
    fitting, known, left = _fitting(content, in_directory=True), [], Counter[str]()
    for path in sorted(_walk(directory)):
        if not path.is_file():
            left["broken links"] += 1
        elif _kind(path, fitting):
            known.append((str(path.relative_to(directory)), path))
        else:
            left[path.suffix or "without a suffix"] += 1
    if not known:
        raise UserError(f"no {', '.join(fitting.values())} file in --data.{split} {directory}")
    train, val = by_words(known)
    chosen = train if split == "train" else val or [path for _, path in known]
    if not chosen:
        raise UserError(f"only validation and test files in --data.train {directory}, such as {known[0][1].name}")
    if split == "train" and len(known) > len(chosen):
        left["of other splits by their names"] += len(known) - len(chosen)
    if left:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left.most_common())
        note(f"{directory}: {len(chosen):,} files are read, {left.total():,} are not: {kinds}")
    return chosen


def _walk(directory: Path) -> Iterator[Path]:
    """Yields the files of a directory and of linked ones, each directory once, real ones first, and none hidden."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}")

    waiting, seen = [str(directory)], set()
    while waiting:
        for root, folders, names in os.walk(waiting.pop(0), onerror=refuse):
            is_new = (real := os.path.realpath(root)) not in seen
            seen.add(real)
            folders[:] = sorted(name for name in folders if is_new and not name.startswith("."))
            waiting += [path for name in folders if os.path.islink(path := os.path.join(root, name))]
            yield from (Path(root, name) for name in names if is_new and not name.startswith("."))


def _fitting(content: Content, in_directory: bool = False) -> dict[str, str]:
    """Marks of the kinds with such content. In directories of documents a .json file describes the others."""
    marks = {name: kind.mark for name, kind in KINDS.items() if content in kind.contents and kind.mark.startswith(".")}
    return {
        name: mark for name, mark in marks.items() if not (in_directory and (content, mark) == ("documents", ".json"))
    }


def _kind(path: Path, fitting: Mapping[str, str]) -> str | None:
    return next((name for name, mark in fitting.items() if path.name.lower().endswith(mark)), None)


def _file(path: Path, content: Content) -> Source:
    fitting = _fitting(content)
    kind = _kind(path, fitting)
    if kind is None:
        hint = f"; {TEXT}:{path} reads it as documents" if _kind(path, _fitting("documents")) else ""
        raise UserError(f"{path} has an unsupported suffix; expected one of: {', '.join(fitting.values())}{hint}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not size:
        raise UserError(f"{path} is empty")
    if problem := files.misnamed(head, KINDS[kind].mark):
        raise UserError(f"{path} {problem}")
    return Source(kind, str(path), size)
