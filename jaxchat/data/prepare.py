"""Documents, or conversations, to a tokenizer and to rows on disk, made once and kept in a cache that runs share.

    <cache>/tokenizers/<key>/        tokenizer.model, tokenizer.json
    <cache>/rows/<key>/              manifest.json, shard-00000.array_record, ...

A key is a hash of everything that decides the content: the content of the sources, the tokenizer, the row length and
the rules. So a change makes a new folder, and old rows are never met by accident.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from jaxchat.data import cache, conversations, workers
from jaxchat.data.batch import token_dtype
from jaxchat.data.files import Reading, Source
from jaxchat.data.shards import NUMBERS, Counts, Recipe, finished, plan
from jaxchat.data.sources import SUFFIXES, Split, documents, find
from jaxchat.data.streams import Rows, open_rows
from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer, TokenizerConfig, report, sample, train_tokenizer

FORMAT = 1  # raise it when the same key would make other rows
MOST_IDS = 2**24  # of a vocabulary; far above what any text needs, far below what fits no memory
TOKENIZER_MARGIN = 8  # times its sample, on disk, is what a tokenizer's training reads at most
TEXT = "text:"  # before an entry of documents where the others are conversations
Log = Callable[[str], None]
Form = Literal["text", "chat", "alpaca"]


@dataclass(frozen=True)
class Data:
    """Documents, and what is made of them."""

    train: tuple[str, ...] = ("tinyworld:train",)
    """Files, directories, globs, tinyworld:train or hub:NAME to train on."""
    val: tuple[str, ...] = ()
    """The same for validation; none holds out a share of the training documents."""
    val_fraction: float = 0.01
    """Share of documents held out where val is empty, chosen by a hash of each document's text."""
    weights: tuple[float, ...] = ()
    """Share of each entry of train in a batch; none takes every row once an epoch."""
    vocab: int = 32768
    row_length: int = 2048
    text_column: str = "text"
    encoding: str = "utf-8"
    packing: Literal["best_fit", "concatenate", "crop"] = "best_fit"
    """best_fit and concatenate lose no token; crop is nanochat's loader, which throws the ends of documents away (of
    training documents: validation is always scored whole)."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    workers: int = 0
    """Processes that prepare data; 0 takes every core."""
    cache: str | None = None
    """Directory for tokenizers, rows and downloads; by default `cache` beside the runs."""
    format: Form = "text"
    """Documents of text; conversations in turns; or single questions and answers in Alpaca's literal template. An entry
    text:... is of documents also where the others are conversations, so that they are not forgotten."""
    train_on: Literal["assistant", "everything"] = "assistant"
    """What of a conversation is learned: what the assistant says, or every token."""
    epochs: tuple[float, ...] = ()
    """How often each entry of train is seen in one pass of all; none sees each once. Not with weights."""

    def __post_init__(self) -> None:
        for name in ("weights", "epochs"):
            given = getattr(self, name)
            if given and len(given) != len(self.train):
                raise ValueError(f"data.{name} has {len(given)} entries for {len(self.train)} of data.train")
            if not all(0 < share < math.inf for share in given):
                raise ValueError(f"data.{name}={given} must be positive and finite")
        if self.weights and self.epochs:
            raise ValueError("data.weights and data.epochs both say how often an entry of data.train is seen: give one")
        if self.format != "text" and self.packing != "best_fit":
            raise ValueError(f"data.packing={self.packing} is for text: conversations are never cut")
        if not 1 <= self.vocab <= MOST_IDS:
            raise ValueError(f"data.vocab={self.vocab} must lie between 1 and {MOST_IDS}")
        if not self.val and not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1 where data.val is empty")
        if self.row_length < 2:
            raise ValueError(f"data.row_length={self.row_length} must be at least 2")
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must be 0 or more")

    @property
    def held_out(self) -> float:
        return 0.0 if self.val else self.val_fraction


def ensure_tokenizer(data: Data, cache_directory: str | Path, seed: int, log: Log) -> Tokenizer:
    """The saved tokenizer that `data` names, or the one trained on its training documents, made now if missing."""
    directory = ensure_tokenizer_directory(data, cache_directory, seed, log)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size != data.vocab:
        size = tokenizer.vocab_size
        raise UserError(f"the tokenizer in {directory} has {size} ids: set --data.vocab={size}")
    return tokenizer


def ensure_tokenizer_directory(data: Data, cache_directory: str | Path, seed: int, log: Log) -> Path:
    """Where that tokenizer is saved, made now if missing."""
    config, cache_directory = data.tokenizer, _local(cache_directory)
    if config.path is not None:
        return Path(config.path)
    found = zip(data.train, _find_all(data, cache_directory, log)["train"])
    sources = list(chain.from_iterable(part for spec, part in found if _form(data, spec) == data.format))
    name = cache.key(
        format=FORMAT,
        vocab=data.vocab,
        config=asdict(config),
        seed=seed,
        sources=_content(sources, cache_directory),
        **_reading(data),
    )
    directory = cache_directory / "tokenizers" / name
    if (directory / "tokenizer.json").exists():
        return directory
    with cache.locked(directory.parent, log):
        if (directory / "tokenizer.json").exists():
            return directory
        start = time.monotonic()
        log(f"training a {config.algorithm} tokenizer of {data.vocab:,} ids on {' '.join(data.train)}")
        blocks = sample(_training_texts(sources, data), config.sample_bytes, seed=seed)
        tokenizer = train_tokenizer(blocks, vocab=data.vocab, config=config, seed=seed)
        for warning in report(tokenizer, blocks[:: 1 + len(blocks) // 500]).warnings():
            log(f"warning: {warning}")
        tokenizer.save(directory)
        log(f"tokenizer trained in {time.monotonic() - start:.1f} s: {directory}")
    return directory


def texts(data: Data, split: Split, cache_directory: str | Path, log: Log) -> Iterator[str]:
    """The documents that a tokenizer is trained on, or the held-out ones."""
    found = _find_all(data, _local(cache_directory), log)
    sources = list(chain.from_iterable(found[_origin(data, split)]))
    if split == "train":
        return _training_texts(sources, data)
    read = Reading(data.text_column, data.encoding)
    return chain.from_iterable(_texts_of(source, read, _recipe(data, "val")) for source in sources)


def ensure_rows(data: Data, tokenizer: Tokenizer, split: Split, cache_directory: str | Path, log: Log) -> list[Rows]:
    """The rows of each entry of train, or of validation, made now if missing.

    Where val is empty, validation takes the held-out share of every entry of train, if there is a document in it.
    """
    cache_directory = _local(cache_directory)
    origin = _origin(data, split)
    specs = data.train if origin == "train" else data.val
    found = _find_all(data, cache_directory, log)[origin]
    rows = [
        _ensure(data, tokenizer, split, spec=spec, sources=sources, cache_directory=cache_directory, log=log)
        for spec, sources in zip(specs, found)
    ]
    if split != origin:
        if not any(map(len, rows)):
            raise UserError(
                f"--data.val_fraction={data.val_fraction} holds out no document of --data.train "
                f"{' '.join(data.train)}: raise it, or name other documents with --data.val"
            )
        return [part for part in rows if len(part)]
    for spec, part in zip(specs, rows):
        if not len(part):
            raise UserError(_nothing(part.manifest, f"--data.{split} {spec}"))
    return rows


def summary(rows: Sequence[Rows]) -> dict[str, Any]:
    """What preparation did, over all entries of a split; speed is of text, when the rows were made."""
    manifests = [part.manifest for part in rows]
    total = {
        name: sum(manifest.get(name, 0) for manifest in manifests) for name in (*NUMBERS, "seconds", "seconds_bytes")
    }
    ids = sum(manifest["rows"] * (manifest["row_length"] + 1) for manifest in manifests)
    talks = [manifest for manifest in manifests if _is_talk(manifest)]
    counts = {
        "trained_fraction": round(total["trained"] / max(total["tokens"], 1), 6),
        "too_long": total["too_long"],
        "skipped": sum(sum(manifest["skipped"].values()) for manifest in talks),
    }
    return {
        "rows": total["rows"],
        "tokens": total["tokens"],
        "documents": total["documents"],
        "bytes": total["bytes"],
        "discarded_fraction": round(total["discarded"] / max(total["tokens"] + total["discarded"], 1), 6),
        "padding_fraction": round(total["padding"] / max(ids, 1), 6),
        "cut_documents": total["cut"],
        "empty_documents": total["empty"],
        **(counts if talks else {}),
        "megabytes_per_second": round(total["seconds_bytes"] / 1e6 / max(total["seconds"], 1e-3), 3),
        "paths": [str(part.directory) for part in rows],
    }


def _ensure(
    data: Data,
    tokenizer: Tokenizer,
    split: Split,
    *,
    spec: str,
    sources: Sequence[Source],
    cache_directory: Path,
    log: Log,
) -> Rows:
    recipe = _recipe(data, split, _form(data, spec))
    content = _content(sources, cache_directory)
    number = {source: i for i, source in enumerate(sources)}
    dealt = [[(number[source], part, parts) for source, part, parts in job.parts] for job in plan(sources)]
    name = cache.key(format=FORMAT, tokenizer=tokenizer.hash, sources=content, shards=dealt, **recipe.decides())
    directory = cache_directory / "rows" / name
    if not _is_whole(directory):
        with cache.locked(directory, log):
            if not _is_whole(directory):
                log(f"preparing {split} rows of {data.row_length} tokens from {spec} ({len(sources)} sources)")
                made = _make(directory, sources, recipe, tokenizer, data.workers)
                manifest = {
                    "format": FORMAT,
                    "spec": spec,
                    "recipe": asdict(recipe),
                    "row_length": data.row_length,
                    "vocab": tokenizer.vocab_size,
                    "dtype": token_dtype(tokenizer.vocab_size).name,
                    "tokenizer": tokenizer.hash,
                    "sources": [
                        {"path": source.path, "bytes": source.size, "sha256": sha256}
                        for source, (_, sha256) in zip(sources, content)
                    ],
                    **made,
                }
                cache.write_json(directory / "manifest.json", manifest)
                log(_summary(manifest, directory))
                for warning in _warnings(manifest):
                    log(f"warning: {spec}: {warning}")
    return open_rows(directory, tokenizer_hash=tokenizer.hash)


def _is_whole(directory: Path) -> bool:
    manifest = cache.read_json(directory / "manifest.json")
    if manifest is None:
        return False
    paths = [directory / shard["file"] for shard in manifest["shards"]]
    sizes = [path.stat().st_size if path.exists() else None for path in paths]
    return sizes == [shard["bytes"] for shard in manifest["shards"]]


def _make(
    directory: Path, sources: Sequence[Source], recipe: Recipe, tokenizer: Tokenizer, processes: int
) -> dict[str, Any]:
    """Makes the shards that are not there yet; their files and the counts of all."""
    for leftover in directory.glob("*.tmp"):
        leftover.unlink(missing_ok=True)
    start = time.monotonic()
    jobs = plan(sources)
    counts = {job.shard: found for job in jobs if (found := finished(directory, job))}
    kept = sum(found.bytes for found in counts.values())
    pending = [job for job in jobs if job.shard not in counts]
    counts |= workers.run(pending, directory, recipe, tokenizer, processes=processes)
    total = Counts()
    for job in jobs:
        total.add(counts[job.shard])
    return {
        **asdict(total),
        "seconds": round(time.monotonic() - start, 3),
        "seconds_bytes": total.bytes - kept,
        "shards": [
            {"file": job.file, "rows": counts[job.shard].rows, "bytes": (directory / job.file).stat().st_size}
            for job in jobs
        ],
    }


def _training_texts(sources: Sequence[Source], data: Data) -> Iterator[str]:
    """Training documents for a tokenizer: all of them in order, or shards spread evenly over a large corpus."""
    recipe = _recipe(data, "train")
    parts = [(source, 0, 1) for source in sources]
    step = sum(source.size for source in sources) // (TOKENIZER_MARGIN * data.tokenizer.sample_bytes)
    if step > 1:
        parts = [part for job in plan(sources)[::step] for part in job.parts]
    for source, part, of in parts:
        yield from _texts_of(source, Reading(data.text_column, data.encoding, part, of), recipe)


def _texts_of(source: Source, reading: Reading, recipe: Recipe) -> Iterator[str]:
    """The documents of a recipe's split, or the words of its conversations."""
    if recipe.form == "text":
        return filter(recipe.takes, documents(source, reading))
    found = conversations.conversations(source, reading, recipe.form)
    return (conversations.words(messages) for messages in found if recipe.takes(conversations.opening(messages)))


def _recipe(data: Data, split: Split, form: Form | None = None) -> Recipe:
    share: Split = split if data.held_out else "train"
    packing = "best_fit" if split == "val" and data.packing == "crop" else data.packing
    said = (form or data.format, data.train_on)
    return Recipe(data.row_length, packing, data.text_column, data.encoding, data.held_out, share, *said)


def _form(data: Data, spec: str) -> Form:
    """How an entry is read: text:... holds documents among conversations."""
    return "text" if spec.startswith(TEXT) else data.format


def _origin(data: Data, split: Split) -> Split:
    """Which of the two options names the documents of a split."""
    return "val" if split == "val" and data.val else "train"


def _find_all(data: Data, cache_directory: Path, log: Log) -> dict[Split, list[list[Source]]]:
    """The sources of each entry of train and of val; refuses a file that is in both."""
    if not data.train:  # a configuration may leave it empty, a run may not
        raise UserError("no documents to train on: name files, directories or tinyworld:train with --data.train")
    downloads = cache_directory / "downloads"

    def look(spec: str, split: Split) -> list[Source]:
        suffixes = SUFFIXES if _form(data, spec) == "text" else conversations.SUFFIXES
        return find(spec.removeprefix(TEXT), split, suffixes=suffixes, hub_directory=downloads, log=log)

    train = [look(spec, "train") for spec in data.train]
    val = [look(spec, "val") for spec in data.val]
    every_train, every_val = list(chain.from_iterable(train)), list(chain.from_iterable(val))
    hashes = cache.content_hashes([*every_train, *every_val], cache_directory)
    trained = dict(zip(hashes, every_train))
    for source, sha256 in zip(every_val, hashes[len(every_train) :]):
        if sha256 in trained:
            raise UserError(
                f"{source.path} is in --data.val and, as {trained[sha256].path}, in --data.train; name other files"
            )
    return {"train": train, "val": val}


def _local(directory: str | Path) -> Path:
    if "://" in str(directory):
        raise UserError(f"rows cannot be kept at {directory}: name a directory of this machine with --data.cache")
    return Path(directory)


def _content(sources: Sequence[Source], cache_directory: Path) -> list[tuple[str, str]]:
    return [(source.kind, sha256) for source, sha256 in zip(sources, cache.content_hashes(sources, cache_directory))]


def _reading(data: Data) -> dict[str, Any]:
    reading = {"text_column": data.text_column, "encoding": data.encoding, "held_out": data.held_out}
    return reading if data.format == "text" else reading | {"form": data.format}


def _is_talk(manifest: dict[str, Any]) -> bool:
    return manifest["recipe"].get("form", "text") != "text"


def _summary(manifest: dict[str, Any], directory: Path) -> str:
    counted = f"{manifest['rows']:,} rows, {manifest['tokens']:,} tokens of "
    discarded = manifest["discarded"] / max(manifest["tokens"] + manifest["discarded"], 1)
    padding = manifest["padding"] / max(manifest["rows"] * (manifest["row_length"] + 1), 1)
    took = f"{manifest['seconds']:.1f} s: {directory}"
    if _is_talk(manifest):
        trained = manifest["trained"] / max(manifest["tokens"], 1)
        counts = f"{trained:.2%} of tokens trained on, {padding:.2%} padding; {took}"
        return f"{counted}{_conversations(manifest['documents'])}; {counts}"
    return (
        f"{counted}{manifest['documents']:,} documents; {discarded:.2%} of tokens thrown away, {padding:.2%} padding, "
        f"{manifest['cut']:,} documents cut; {took}"
    )


def _warnings(manifest: dict[str, Any]) -> list[str]:
    """What of the conversations is not in the rows, and why."""
    counts = [
        f"{_conversations(count)} skipped: {reason}; the first is {manifest['examples'][reason]}"
        for reason, count in sorted(manifest["skipped"].items())
    ]
    if manifest["too_long"]:
        counts.append(
            f"{_conversations(manifest['too_long'])} of more than {manifest['row_length'] + 1} tokens left out; "
            f"--data.row_length={manifest['longest'] - 1} takes the longest"
        )
    return counts


def _conversations(count: int) -> str:
    return f"{count:,} conversation{'s' * (count != 1)}"


def _nothing(manifest: dict[str, Any], spec: str) -> str:
    if not _is_talk(manifest):
        return f"no document with text in {spec}"
    return ". ".join([f"no conversation to learn from in {spec}", *_warnings(manifest)])
