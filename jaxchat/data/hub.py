"""Data sets of the Hugging Face hub by name: downloads that resume, with checksums.

    hub:fineweb-edu[:N]         FineWeb-Edu, sample of 10 billion tokens
    hub:fineweb-edu-100bt[:N]   its sample of 100 billion tokens
    hub:climbmix[:N]            karpathy/climbmix-400b-shuffle, what nanochat trains on
    hub:smoltalk[:N]            smol-smoltalk, 460,000 conversations
    hub:gsm8k                   word problems, worked out with a calculator
    hub:mmlu                    questions with four choices: the auxiliary training set
    hub:mmlu-test               its test questions; its few examples are the part to train on
    hub:arc-easy                questions of ARC with choices, the easy ones
    hub:arc-challenge           and the others
    hub:humaneval               functions to be written; the one file is for testing
    hub:OWNER/NAME[/FOLDER][:N] the parquet files of any data set

N is the number of shards, 8 by default, from the first. The same name means for validation the files that are made
for it, and where there are none the last shard to train on, which is then never trained on; files whose names say test
are not read. The list of files is kept at the commit of the first download, so a data set does
not change under a run, and files that are there need no network.
"""

import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from jaxchat.data.cache import locked, read_json, write_json
from jaxchat.data.downloads import Log, Shard, fetch, patiently
from jaxchat.data.sources import TEST, TRAIN, VAL, words_of
from jaxchat.errors import UserError
from jaxchat.launcher import log

DEFAULT_SHARDS = 8
AT_ONCE = 4


@dataclass(frozen=True)
class DataSet:
    """A data set, and what the paths of its files for training and validation look like; by default see `_parts`."""

    repository: str
    folder: str = ""
    train: str = ""
    val: str = ""


DATA_SETS = {
    "fineweb-edu": DataSet("HuggingFaceFW/fineweb-edu", "sample/10BT"),
    "fineweb-edu-100bt": DataSet("HuggingFaceFW/fineweb-edu", "sample/100BT"),
    "climbmix": DataSet("karpathy/climbmix-400b-shuffle"),
    # As in nanochat, but that MMLU is validated on its own validation part: its test part is for evaluation.
    "smoltalk": DataSet("HuggingFaceTB/smol-smoltalk", "data", "^data/train-", "^data/test-"),
    "gsm8k": DataSet("openai/gsm8k", "main", "^main/train-", "^main/test-"),
    "mmlu": DataSet("cais/mmlu", "all", "^all/auxiliary_train-", "^all/validation-"),
    "mmlu-test": DataSet("cais/mmlu", "all", "^all/dev-", "^all/test-"),
    "arc-easy": DataSet("allenai/ai2_arc", "ARC-Easy", "/train-", "/test-"),
    "arc-challenge": DataSet("allenai/ai2_arc", "ARC-Challenge", "/train-", "/test-"),
    "humaneval": DataSet("openai/openai_humaneval", "openai_humaneval", "/test-", "/test-"),
}


def download(spec: str, split: str, directory: Path, *, log: Log = log, endpoint: str | None = None) -> list[Path]:
    """The files that a spec names for a split, downloaded where they are missing."""
    name, data_set, count = _parse(spec)
    place = directory / re.sub(r"[^\w.-]+", "--", name)
    with locked(place, log):
        index = _index(name, data_set, place, endpoint, log)
        trained, held_out = _parts([Shard(**shard) for shard in index["shards"]], data_set)
        if not trained or not held_out:
            raise UserError(f"{spec} has no parquet file to {'validate on' if trained else 'train on'}")
        if split == "val":
            chosen = held_out
        elif count is not None and count > len(trained):
            raise UserError(f"{spec} asks for {count} shards; {data_set.repository} has {len(trained)} to train on")
        else:
            chosen = trained[: count or DEFAULT_SHARDS]
        missing = [shard for shard in chosen if not _is_there(place / shard.name, shard)]
        if missing:
            size = sum(shard.size for shard in missing) / 1e9
            log(f"downloading {len(missing)} shards of {data_set.repository} ({size:.2f} GB) to {place}")
            _fetch_all(missing, data_set, index["commit"], place, endpoint, log)
    return [place / shard.name for shard in chosen]


def _parse(spec: str) -> tuple[str, DataSet, int | None]:
    match = re.fullmatch(r"hub:([^:]+?)(?::([1-9]\d*))?", spec)
    if not match:
        raise UserError(f"{spec} is not hub:NAME or hub:NAME:SHARDS, such as hub:climbmix:8")
    name = match[1]
    if name not in DATA_SETS and not re.fullmatch(r"[\w.-]+/[\w.-]+(/.+)?", name):
        raise UserError(f"no data set {name!r}: name one of {', '.join(DATA_SETS)}, or hub:OWNER/NAME")
    owner, _, rest = name.partition("/")
    repository, _, folder = rest.partition("/")
    data_set = DATA_SETS.get(name) or DataSet(f"{owner}/{repository}", folder)
    return name, data_set, int(match[2]) if match[2] else None


def _parts(shards: Sequence[Shard], data_set: DataSet) -> tuple[list[Shard], list[Shard]]:
    """The files to train on, and those to validate on: by the words in their names, else all but the last, and it."""
    if data_set.train:
        trained, held_out = (
            [shard for shard in shards if re.search(pattern, shard.path)] for pattern in (data_set.train, data_set.val)
        )
        return trained, held_out
    words = {shard: words_of(Path(shard.path)) for shard in shards}
    held_out = [shard for shard in shards if words[shard] & VAL]
    free = [shard for shard in shards if not words[shard] & (VAL | TEST)]
    trained = [shard for shard in free if words[shard] & TRAIN] or free
    return (trained, held_out) if held_out else (trained[:-1], trained[-1:])


def _index(name: str, data_set: DataSet, place: Path, endpoint: str | None, log: Log) -> dict[str, Any]:
    """Commit and shards of a data set, in order: as kept from the first download, or asked of the hub."""
    known = read_json(place / "index.json")
    if known is not None:
        return known
    huggingface_hub = _library()
    api = huggingface_hub.HfApi(endpoint=endpoint)

    def ask() -> dict[str, Any]:
        commit = api.dataset_info(data_set.repository).sha
        tree = api.list_repo_tree(
            data_set.repository,
            data_set.folder or None,
            repo_type="dataset",
            revision=commit,
            recursive=name not in DATA_SETS,
        )
        files = [file for file in tree if file.path.endswith(".parquet")]
        shards = [Shard(file.path, file.size, file.lfs.sha256 if file.lfs else None) for file in files]
        return {"commit": commit, "shards": [asdict(shard) for shard in sorted(shards, key=lambda shard: shard.path)]}

    index = patiently(ask, data_set.repository, threading.Event(), log, _transient())
    if len(index["shards"]) < 2 and not data_set.train:
        raise UserError(f"hub:{name} has {len(index['shards'])} parquet files; one to train on and one for validation")
    log(f"hub:{name} is {data_set.repository} at {index['commit']}, {len(index['shards'])} shards")
    write_json(place / "index.json", index)
    return index


def _fetch_all(
    shards: Sequence[Shard], data_set: DataSet, commit: str, place: Path, endpoint: str | None, log: Log
) -> None:
    library = _library()
    headers = library.utils.build_hf_headers()
    console = Console(stderr=True)
    columns = TextColumn("downloading"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    stop = threading.Event()  # set when one download fails for good, so that the others end too
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=sum(shard.size for shard in shards))

        def one(shard: Shard) -> None:
            url = library.hf_hub_url(
                data_set.repository, shard.path, repo_type="dataset", revision=commit, endpoint=endpoint
            )
            show = lambda size: progress.advance(bar, size)  # noqa: E731
            try:
                attempt = lambda: fetch(url, shard, place, stop, headers=headers, show=show)  # noqa: E731
                patiently(attempt, url, stop, log, _transient())
            except BaseException:
                stop.set()
                raise

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            for _ in pool.map(one, shards):
                pass
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _is_there(path: Path, shard: Shard) -> bool:
    return path.exists() and path.stat().st_size == shard.size


def _transient() -> tuple[type[Exception], ...]:
    """The library's own errors that are worth another attempt: by version, those of requests or of one of two httpx."""
    found: tuple[type[Exception], ...] = _library().errors.HfHubHTTPError.__bases__
    return found


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError("data sets of the hub need huggingface_hub: pip install 'jaxchat[hub]'") from None
    return huggingface_hub
