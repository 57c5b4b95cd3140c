"""Turns documents or conversations into a tokenizer and rows on disk, in a cache that runs share.

    <cache>/tokenizers/<key>/        tokenizer.model, tokenizer.json
    <cache>/rows/<key>/              manifest.json, shard-00000.array_record, ...

A key is a hash of everything that determines the content: the content of the sources, the tokenizer, the row length
and the packing rules. Any change of these makes a new directory, so outdated rows are never used.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from jaxchat import signals
from jaxchat.data import cache, workers
from jaxchat.data.batch import token_dtype
from jaxchat.data.cache import Log
from jaxchat.data.formats import FORMATS, Format
from jaxchat.data.reports import Entry, Longer, count, division, nothing, warnings
from jaxchat.data.shards import NUMBERS, Counts, Recipe, assign_shards, finished
from jaxchat.data.source import Reading, Source, Split
from jaxchat.data.sources import TEXT, content_hashes, find, held_out_from
from jaxchat.data.streams import Rows
from jaxchat.errors import UserError
from jaxchat.paths import user_path
from jaxchat.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, report, sample, train_tokenizer

FORMAT = 1  # increase it when the same key would make different rows
MOST_IDS = 2**24  # maximum vocabulary: far more than any text needs, and small enough for memory
TOKENIZER_MARGIN = 8  # tokenizer training reads about this many times its sample_bytes from disk


@dataclass(frozen=True)
class Data:
    """The training and validation data, and how they are tokenized and packed."""

    train: tuple[str, ...] = ("tinyworld:train",)
    """Training data: files, directories, globs, tinyworld:train or hub:NAME."""
    val: tuple[str, ...] = ()
    """Validation data, given in the same way; if empty, a share of the training documents is held out."""
    val_fraction: float = 0.01
    """Share of documents held out if val is empty, selected by a hash of each document's text."""
    weights: tuple[float, ...] = ()
    """Share of each entry of train in a batch; if empty, every row is used once per epoch."""
    vocab: int = 32768  # Number of token ids, special tokens included.
    row_length: int = 2048  # Tokens of a training row, which is the context.
    text_column: str = "text"  # Field or column that holds the text.
    encoding: str = "utf-8"  # Encoding of text files, by Python's name.
    packing: Literal["best_fit", "concatenate", "crop"] = "best_fit"
    """best_fit and concatenate lose no token; crop is nanochat's loader, which discards the ends of documents (only in
    training: validation uses best_fit instead)."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    workers: int = 0
    """Number of processes that prepare data; 0 uses every core."""
    cache: str | None = None
    """Directory for tokenizers, rows and downloads; by default `cache` beside the runs."""
    format: Format = "text"
    """text: documents; chat: conversations; alpaca: single questions and answers in the Alpaca template. An entry
    text:... is read as documents even if the format is chat or alpaca, to mix pretraining text into fine-tuning."""
    train_on: Literal["assistant", "everything"] = "assistant"
    """Training targets of a conversation: the assistant's tokens, or every token."""
    epochs: tuple[float, ...] = ()
    """How often each entry of train is repeated per pass; if empty, once. Cannot be combined with weights."""

    def __post_init__(self) -> None:
        for name in ("weights", "epochs"):
            given = getattr(self, name)
            if given and len(given) != len(self.train):
                wrong = f"data.{name} has {len(given)} entries, but data.train has {len(self.train)}"
                raise ValueError(f"{wrong}: give one for each, or --data.{name} without a value")
            if not all(0 < share < math.inf for share in given):
                raise ValueError(f"data.{name}={given} must be positive and finite")
        if self.weights and self.epochs:
            raise ValueError("data.weights and data.epochs cannot be combined: set only one of them")
        if FORMATS[self.format].content != "documents" and self.packing != "best_fit":
            raise ValueError(f"data.packing={self.packing} is for text only: use best_fit for conversations")
        if not 1 <= self.vocab <= MOST_IDS:
            raise ValueError(f"data.vocab={self.vocab} must lie between 1 and {MOST_IDS}")
        if not self.val and not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1 if data.val is empty")
        if self.row_length < 2:
            raise ValueError(f"data.row_length={self.row_length} must be at least 2")
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must be 0 or more")

    @property
    def held_out(self) -> float:
        """Share of the training documents that is held out; 0 with validation data of their own."""
        return 0.0 if self.val else self.val_fraction


def ensure_tokenizer(data: Data, cache_directory: str | Path, seed: int, log: Log) -> Tokenizer:
    """Loads the tokenizer of `data`, training it if missing; raises `UserError` if its size is not `data.vocab`."""
    directory = ensure_tokenizer_directory(data, cache_directory, seed, log)
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size != data.vocab:
        size = tokenizer.vocab_size
        raise UserError(f"the tokenizer in {directory} has {size} ids: set --data.vocab={size}")
    return tokenizer


def ensure_tokenizer_directory(data: Data, cache_directory: str | Path, seed: int, log: Log) -> Path:
    """Directory of the tokenizer that `ensure_tokenizer` loads; trains it if missing."""
    config, cache_directory = data.tokenizer, user_path(cache_directory)
    if config.path is not None:
        return user_path(config.path)
    entries = [one for one in _find_all(data, cache_directory, log)["train"] if one.form == data.format]
    sources = [source for entry in entries for source in entry.sources]
    decides = asdict(config)
    if config.chat_format == "nanochat":  # Tokenizers were cached before there were other formats.
        del decides["chat_format"]
    name = cache.key(
        format=FORMAT,
        vocab=data.vocab,
        config=decides,
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
        blocks = sample(_training_texts(entries, data), config.sample_bytes, seed=seed)
        if not blocks:
            if reason := division(entries, data):
                raise UserError(f"no text to train a tokenizer on: {reason}")
            empty = "every document is empty; are they in another column than --data.text_column?"
            raise UserError(f"{' '.join(data.train)} has no text to train a tokenizer on: {empty}")
        tokenizer = train_tokenizer(blocks, vocab=data.vocab, config=config, seed=seed)
        for warning in report(tokenizer, blocks[:: 1 + len(blocks) // 500]).warnings():
            log(f"warning: {warning}")
        tokenizer.save(directory)
        log(f"tokenizer trained in {time.monotonic() - start:.1f} s: {directory}")
    return directory


def texts(data: Data, split: Split, cache_directory: str | Path, log: Log) -> Iterator[str]:
    """The texts that tokenizer training reads ("train"), or the held-out texts ("val")."""
    entries = _find_all(data, user_path(cache_directory), log)[_origin(data, split)]
    if split == "train":
        return _training_texts(entries, data)
    reading = Reading(data.text_column, data.encoding)
    pairs = ((source, _recipe(data, "val", entry.form)) for entry in entries for source in entry.sources)
    return chain.from_iterable(_texts_of(source, reading, recipe) for source, recipe in pairs)


def ensure_rows(
    data: Data,
    tokenizer: Tokenizer,
    split: Split,
    cache_directory: str | Path,
    log: Log,
    longer: Longer = "--data.row_length={}".format,
) -> list[Rows]:
    """The rows of each entry of train or val, prepared if missing. Raises `UserError` if there is no row.

    If val is empty, the validation rows are those of the held-out documents of each entry of train that has any.
    `longer` returns the options that a message advises for longer rows.
    """
    cache_directory = user_path(cache_directory)
    origin = _origin(data, split)
    entries = _find_all(data, cache_directory, log, note=log if split == "train" else None)[origin]
    rows = [_ensure(data, tokenizer, split, entry, cache_directory, log, longer) for entry in entries]
    divided = partial(division, entries, data)
    if split != origin:
        if not any(map(len, rows)):
            others = [reason for part in rows for reason in warnings(part.manifest, longer)]
            raise UserError(f"nothing to validate on: {divided() or '. '.join(others)}")
        return [part for part in rows if len(part)]
    for entry, part in zip(entries, rows):
        if not len(part):
            raise UserError(nothing(part.manifest, f"--data.{split} {entry.spec}", longer, divided))
    return rows


def summary(rows: Sequence[Rows]) -> dict[str, Any]:
    """Statistics of preparation, summed over the entries of a split; the speed is that at which the rows were made."""
    manifests = [part.manifest for part in rows]
    total = {
        name: sum(manifest.get(name, 0) for manifest in manifests) for name in (*NUMBERS, "seconds", "seconds_bytes")
    }
    ids = sum(manifest["rows"] * (manifest["row_length"] + 1) for manifest in manifests)
    return {
        "rows": total["rows"],
        "tokens": total["tokens"],
        "documents": total["documents"],
        "bytes": total["bytes"],
        "discarded_fraction": round(total["discarded"] / max(total["tokens"] + total["discarded"], 1), 6),
        "padding_fraction": round(total["padding"] / max(ids, 1), 6),
        "cut_documents": total["cut"],
        "empty_documents": total["empty"],
        "trained_fraction": round(total["trained"] / max(total["tokens"], 1), 6),
        "too_long": total["too_long"],
        "skipped": sum(sum(manifest["skipped"].values()) for manifest in manifests),
        "megabytes_per_second": round(total["seconds_bytes"] / 1e6 / max(total["seconds"], 1e-3), 3),
        "paths": [str(part.directory) for part in rows],
    }


def _ensure(
    data: Data, tokenizer: Tokenizer, split: Split, entry: Entry, cache_directory: Path, log: Log, longer: Longer
) -> Rows:
    spec, form, sources = entry
    recipe = _recipe(data, split, form)
    content = _content(sources, cache_directory)
    number = {source: i for i, source in enumerate(sources)}
    assignment = [
        [(number[source], part, parts) for source, part, parts in job.parts]
        for job in assign_shards(sources, data.encoding)
    ]
    decides = recipe.decides(sources)
    name = cache.key(format=FORMAT, tokenizer=tokenizer.hash, sources=content, shards=assignment, **decides)
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
                log(_summary(Rows(directory)))
                own = _trained_on(data, sources, recipe, cache_directory) if split == "val" and data.val else []
                for warning in (*warnings(manifest, longer), *own):
                    log(f"warning: {spec}: {warning}")
    return Rows(directory)


def _trained_on(data: Data, sources: Sequence[Source], recipe: Recipe, cache_directory: Path) -> list[str]:
    """A warning if held-out files share texts with the training data, of which some shards are compared if there are
    many. Generators and the hub are left out, because they split their data themselves."""
    reading = Reading(data.text_column, data.encoding)
    files = [source for source in sources if Path(source.path).is_file()]
    held = {held_out_from(text) for source in files for text in _texts_of(source, reading, recipe) if text}
    entries = _find_all(data, cache_directory, lambda _: None)["train"] if held else []
    seen = len(held.intersection(map(held_out_from, _training_texts(entries, data, recipe.form))))
    _, step = _training_parts(entries, data, recipe.form)
    where = f", compared with one of {step} shards of --data.train" if step > 1 else ""
    remedy = "losses on them say little; remove them from --data.train or --data.val"
    return [f"{seen:,} of {len(held):,} different texts are also trained on{where}: {remedy}"] if seen else []


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
    """Makes the missing shards; returns the shard files and total counts for the manifest."""
    for leftover in directory.glob("*.tmp"):
        leftover.unlink(missing_ok=True)
    start = time.monotonic()
    jobs = assign_shards(sources, recipe.encoding)
    counts = {job.shard: shard for job in jobs if (shard := finished(directory, job))}
    reused_bytes = sum(shard.bytes for shard in counts.values())
    pending = [job for job in jobs if job.shard not in counts]
    counts |= workers.run(pending, directory, recipe, tokenizer, processes=processes)
    total = Counts()
    for job in jobs:
        total.add(counts[job.shard])
    return {
        **asdict(total),
        "seconds": round(time.monotonic() - start, 3),
        "seconds_bytes": total.bytes - reused_bytes,
        "shards": [
            {"file": job.file, "rows": counts[job.shard].rows, "bytes": (directory / job.file).stat().st_size}
            for job in jobs
        ],
    }


def _training_texts(entries: Sequence[Entry], data: Data, form: Format | None = None) -> Iterator[str]:
    """Texts of the entries of one format, by default the data's, for tokenizer training: see `_training_parts`."""
    recipe = _recipe(data, "train", form)
    for source, part, of in _training_parts(entries, data, recipe.form)[0]:
        yield from _texts_of(source, Reading(data.text_column, data.encoding, part, of), recipe)


def _training_parts(entries: Sequence[Entry], data: Data, form: Format) -> tuple[list[tuple[Source, int, int]], int]:
    """Parts of sources, and one of how many shards they are: all, or evenly spaced shards of a large corpus."""
    sources = [source for entry in entries if entry.form == form for source in entry.sources]
    step = sum(source.size for source in sources) // (TOKENIZER_MARGIN * data.tokenizer.sample_bytes)
    if step <= 1:
        return [(source, 0, 1) for source in sources], 1
    return [part for job in assign_shards(sources, data.encoding)[::step] for part in job.parts], step


def _texts_of(source: Source, reading: Reading, recipe: Recipe) -> Iterator[str]:
    """The documents of a recipe's split, or the texts of its conversations."""
    examples = FORMATS[recipe.form].examples(source, reading, lambda *_: None)
    for example in examples:
        signals.check()
        if recipe.takes(example.opening):
            yield example.text


def _recipe(data: Data, split: Split, form: Format | None = None) -> Recipe:
    side: Split = split if data.held_out else "train"
    packing = "best_fit" if split == "val" and data.packing == "crop" else data.packing
    chat = (form or data.format, data.train_on)
    return Recipe(data.row_length, packing, data.text_column, data.encoding, data.held_out, side, *chat)


def _origin(data: Data, split: Split) -> Split:
    """The option, train or val, that lists the data of a split."""
    return "val" if split == "val" and data.val else "train"


def _find_all(data: Data, cache_directory: Path, log: Log, note: Log | None = None) -> dict[Split, list[Entry]]:
    """The entries of train and of val with their sources. Raises `UserError` if a file is in both."""
    if not data.train:  # a configuration may leave it empty, a run may not
        raise UserError("no documents to train on: set --data.train to files, directories or tinyworld:train")

    def find_entry(spec: str, split: Split) -> Entry:
        form = TEXT if spec.startswith(f"{TEXT}:") else data.format
        content, downloads = FORMATS[form].content, cache_directory / "downloads"
        name = spec.removeprefix(f"{TEXT}:")
        return Entry(spec, form, find(name, split, content, downloads=downloads, log=log, note=note))

    train = [find_entry(spec, "train") for spec in data.train]
    val = [find_entry(spec, "val") for spec in data.val]
    every_train, every_val = ([source for entry in part for source in entry.sources] for part in (train, val))
    hashes = content_hashes([*every_train, *every_val], cache_directory)
    train_by_hash = dict(zip(hashes, every_train))
    for source, sha256 in zip(every_val, hashes[len(every_train) :]):
        if sha256 in train_by_hash:
            path = train_by_hash[sha256].path
            raise UserError(f"{source.path} is in --data.val and, as {path}, in --data.train; remove it from one")
    return {"train": train, "val": val}


def _content(sources: Sequence[Source], cache_directory: Path) -> list[tuple[str, str]]:
    return [(source.kind, sha256) for source, sha256 in zip(sources, content_hashes(sources, cache_directory))]


def _reading(data: Data) -> dict[str, Any]:
    reading = {"text_column": data.text_column, "encoding": data.encoding, "held_out": data.held_out}
    return reading if FORMATS[data.format].content == "documents" else reading | {"form": data.format}


def _summary(rows: Rows) -> str:
    found, seconds = summary([rows]), rows.manifest["seconds"]
    return (
        f"{found['rows']:,} rows, {found['tokens']:,} tokens of {count(rows.manifest, found['documents'])}, "
        f"{found['cut_documents']:,} of them cut; {found['trained_fraction']:.2%} of tokens trained on, "
        f"{found['discarded_fraction']:.2%} of tokens discarded, {found['padding_fraction']:.2%} padding; "
        f"{seconds:.1f} s: {rows.directory}"
    )
