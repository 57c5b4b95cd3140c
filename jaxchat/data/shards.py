"""Assigns sources to shards, and makes shards of rows.

A shard is an ArrayRecord file of rows and a JSON file of counts, which is written last: a shard without counts is
incomplete and is made again. The assignment depends on the sources only, never on the number of workers.
"""

import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jaxchat.data.batch import TARGET, encode_row, token_dtype
from jaxchat.data.cache import read_json, write_json
from jaxchat.data.formats import FORMATS
from jaxchat.data.packing import Rule
from jaxchat.data.source import Reading, Source, Split
from jaxchat.data.sources import KINDS, held_out
from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer
from jaxchat.tokenizer.chat import Malformed

# Bytes on disk per shard. A small corpus is split into smaller shards, so that every process has work.
LEAST_PART, SHARDS_OF_SMALL, MOST_SHARDS = 1 << 20, 16, 512
PACKED_TOKENS = 8_000_000  # tokens packed together; bounds the memory of a worker
REPORT_SECONDS = 0.5

Report = Callable[[float, int], None]
"""Called with the finished fraction of a shard and the bytes of text read since the last call."""


@dataclass(frozen=True)
class Recipe:
    """How documents become rows, apart from the tokenizer."""

    row_length: int
    packing: Rule
    text_column: str
    encoding: str
    held_out: float = 0.0
    """Share of documents held out by hash; 0 takes every document."""
    split: Split = "train"
    """Which documents to take if `held_out` is not 0."""
    form: str = "text"
    """A row of FORMATS. Conversations are never split (`packing` is ignored)."""
    train_on: Literal["assistant", "everything"] = "assistant"
    """Training targets of a conversation."""

    def decides(self, sources: Sequence[Source]) -> dict[str, Any]:
        """Everything that determines the rows, for a cache key; old keys of text stay valid without the chat fields."""
        parts = asdict(self)
        chat = {name: parts.pop(name) for name in ("form", "train_on")}
        if FORMATS[self.form].content == "documents":
            return parts
        version = max(KINDS[source.kind].conversations for source in sources)
        return {**parts, **chat, "packing": "whole", "conversations": version}

    def takes(self, text: str) -> bool:
        """Whether a text, the opening of a document or conversation, is of the recipe's split."""
        return not self.held_out or held_out(text, self.held_out) == (self.split == "val")


@dataclass(frozen=True)
class ShardJob:
    """One shard to make: (source, part, parts) in order."""

    shard: int
    parts: tuple[tuple[Source, int, int], ...]

    @property
    def file(self) -> str:
        return f"shard-{self.shard:05d}.array_record"

    @property
    def size(self) -> float:
        """Bytes on disk to read."""
        return sum(source.size / parts for source, _, parts in self.parts)


@dataclass
class Counts:
    """Statistics of documents or conversations; tokens are counted without BOS, padding in ids."""

    rows: int = 0
    documents: int = 0
    empty: int = 0
    cut: int = 0
    bytes: int = 0
    tokens: int = 0
    discarded: int = 0
    padding: int = 0
    trained: int = 0
    """Number of training targets, without BOS."""
    several: int = 0
    """Conversations with more than one answer."""
    too_long: int = 0
    """Conversations left out because they do not fit in a row."""
    longest: int = 0
    """Ids of the longest document or conversation."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of malformed conversations by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """Location and error of the first malformed conversation per reason."""
    notes: dict[str, int] = field(default_factory=dict)
    """Number of conversations by what was not read as it stands."""

    def add(self, other: "Counts") -> None:
        """Adds the counts of another shard."""
        for name in NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        for name in ("skipped", "notes"):
            setattr(self, name, dict(Counter(getattr(self, name)) + Counter(getattr(other, name))))
        self.examples = {**other.examples, **self.examples}

    def skip(self, reason: str, example: Callable[[], str]) -> None:
        """Counts a malformed conversation; `example` describes the first of each reason."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if reason not in self.examples:
            self.examples[reason] = example()


NUMBERS = tuple(item.name for item in fields(Counts) if item.default == 0 and item.name != "longest")


def assign_shards(sources: Sequence[Source], encoding: str = "utf-8") -> list[ShardJob]:
    """Assigns sources to shards of similar size: splits large files, groups small ones."""
    total = sum(source.size for source in sources)
    shards: list[list[tuple[Source, int, int]]] = []
    space = 0.0
    for source in sources:
        kind = KINDS[source.kind]
        size = max(min(kind.shard_bytes, total // SHARDS_OF_SMALL), total // MOST_SHARDS, LEAST_PART)
        parts = min(-(-source.size // size), kind.most_parts(Reading(encoding=encoding)))
        if parts > 1 or not shards or space < source.size / size:
            shards.extend([(source, part, parts)] for part in range(parts))
            space = 1 - source.size / size if parts == 1 else 0.0
        else:
            shards[-1].append((source, 0, 1))
            space -= source.size / size
    return [ShardJob(i, tuple(parts)) for i, parts in enumerate(shards)]


def finished(directory: Path, job: ShardJob) -> Counts | None:
    """The counts of a shard that is complete on disk, else None."""
    path, record = directory / job.file, read_json(_counts_path(directory, job))
    if record is None or not path.exists() or path.stat().st_size != record["file_bytes"]:
        return None
    return Counts(**record["counts"])


def make_shard(job: ShardJob, directory: Path, recipe: Recipe, tokenizer: Tokenizer, report: Report) -> Counts:
    """Reads, tokenizes and packs documents and writes the shard atomically."""
    path = directory / job.file
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            counts = _write_rows(writer, job, recipe, tokenizer, report)
        finally:
            writer.close()
        written = ArrayRecordReader(str(temporary)).num_records()
        if written != counts.rows:
            raise UserError(f"{temporary} holds {written} of {counts.rows} rows; is the disk full? start again")
        temporary.replace(path)
        write_json(_counts_path(directory, job), {"file_bytes": path.stat().st_size, "counts": asdict(counts)})
        return counts
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path} cannot be written ({error}); is the disk full? start again: finished shards are kept"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _write_rows(
    writer: ArrayRecordWriter, job: ShardJob, recipe: Recipe, tokenizer: Tokenizer, report: Report
) -> Counts:
    counts = Counts()
    dtype = token_dtype(tokenizer.vocab_size)
    pack = FORMATS[recipe.form].pack
    for block in _blocks(job, recipe, tokenizer, counts, report):
        packed = pack(block, recipe.row_length, recipe.packing, bos=tokenizer.bos, dtype=dtype)
        for ids_S, flags_S in zip(packed.ids_RS, packed.flags_RS):
            writer.write(encode_row(ids_S, flags_S, dtype))
        counts.rows += len(packed.ids_RS)
        counts.trained += int(np.count_nonzero((packed.flags_RS & TARGET > 0) & (packed.ids_RS != tokenizer.bos)))
        for name in ("cut", "tokens", "discarded", "padding", "too_long"):
            setattr(counts, name, getattr(counts, name) + getattr(packed, name))
    return counts


def _blocks(job: ShardJob, recipe: Recipe, tokenizer: Tokenizer, counts: Counts, report: Report) -> Iterator[list[Any]]:
    """Yields blocks of (ids, loss mask) of documents or conversations to be packed together; updates `counts`."""
    data_format, dtype = FORMATS[recipe.form], token_dtype(tokenizer.vocab_size)
    everything = recipe.train_on == "everything"
    block: list[Any] = []
    tokens = reported_bytes = 0
    reported = time.monotonic()

    def skip(row: Any, error: Malformed, where: Callable[[], str]) -> None:
        if recipe.takes(json.dumps(row, default=str)):  # assigns the row to one split, so that it is counted once
            count_skipped(error, where)

    def count_skipped(error: Malformed, where: Callable[[], str]) -> None:
        counts.skip(error.reason, lambda: f"{where()}: {error}")

    for i, (source, part, parts) in enumerate(job.parts):
        reading = Reading(recipe.text_column, recipe.encoding, part, parts)
        for opening, text, value, notes, where in data_format.examples(source, reading, skip):
            if not recipe.takes(opening):
                continue
            if not text:
                counts.empty += 1
                continue
            try:
                ids, mask = data_format.encode(value, tokenizer, everything)
            except Malformed as error:  # for example a part that the tokenizer's chat format lacks
                count_skipped(error, where)
                continue
            counts.documents += 1
            counts.bytes += len(text.encode())
            for note in notes:
                counts.notes[note] = counts.notes.get(note, 0) + 1
            counts.longest = max(counts.longest, len(ids))
            counts.several += data_format.answers(value) > 1
            block.append((np.array(ids, dtype), np.array(mask) if mask else None))
            tokens += len(ids)
            if tokens >= PACKED_TOKENS:
                yield block
                block, tokens = [], 0
            if time.monotonic() - reported > REPORT_SECONDS:
                report((i + reading.fraction) / len(job.parts), counts.bytes - reported_bytes)
                reported, reported_bytes = time.monotonic(), counts.bytes
    yield block
    report(1.0, counts.bytes - reported_bytes)


def _counts_path(directory: Path, job: ShardJob) -> Path:
    return directory / f"shard-{job.shard:05d}.json"
