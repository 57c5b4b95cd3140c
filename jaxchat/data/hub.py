"""Downloads data sets of the Hugging Face hub by name.

    hub:fineweb-edu[:N]         FineWeb-Edu, sample of 10 billion tokens
    hub:fineweb-edu-100bt[:N]   FineWeb-Edu, sample of 100 billion tokens
    hub:climbmix[:N]            karpathy/climbmix-400b-shuffle, nanochat's pretraining data
    hub:smoltalk[:N]            smol-smoltalk, 460,000 conversations
    hub:gsm8k                   math word problems with calculator calls
    hub:mmlu                    four-choice questions: the auxiliary training set
    hub:mmlu-test               MMLU's test questions; the training split is its few-shot examples (dev)
    hub:arc-easy                multiple-choice questions of ARC, easy set
    hub:arc-challenge           multiple-choice questions of ARC, challenge set
    hub:humaneval               Python functions to write; its only file is the test split
    hub:OWNER/NAME[/FOLDER][:N] the parquet files of any data set

N is the number of training shards, counted from the first; the default is 8. In data sets without patterns in
`DATA_SETS`, words in file names decide the split: without validation files, the last training shard is held out, and
test files are not read. The list of files is fixed at the commit of the first download, so that a data set cannot
change during a run; downloaded files need no network.
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
    """A data set, and regular expressions for its training and validation files; `_split` is used if they are empty."""

    repository: str
    folder: str = ""
    train: str = ""
    val: str = ""


DATA_SETS = {
    "fineweb-edu": DataSet("HuggingFaceFW/fineweb-edu", "sample/10BT"),
    "fineweb-edu-100bt": DataSet("HuggingFaceFW/fineweb-edu", "sample/100BT"),
    "climbmix": DataSet("karpathy/climbmix-400b-shuffle"),
    # As in nanochat, except that MMLU uses its validation split for validation: the test split is for evaluation.
    "smoltalk": DataSet("HuggingFaceTB/smol-smoltalk", "data", "^data/train-", "^data/test-"),
    "gsm8k": DataSet("openai/gsm8k", "main", "^main/train-", "^main/test-"),
    "mmlu": DataSet("cais/mmlu", "all", "^all/auxiliary_train-", "^all/validation-"),
    "mmlu-test": DataSet("cais/mmlu", "all", "^all/dev-", "^all/test-"),
    "arc-easy": DataSet("allenai/ai2_arc", "ARC-Easy", "/train-", "/test-"),
    "arc-challenge": DataSet("allenai/ai2_arc", "ARC-Challenge", "/train-", "/test-"),
    "humaneval": DataSet("openai/openai_humaneval", "openai_humaneval", "/test-", "/test-"),
}


def download(spec: str, split: str, directory: Path, *, log: Log = log, endpoint: str | None = None) -> list[Path]:
    """Downloads the missing files of a spec and split; returns the paths of all its files."""
    name, data_set, count = _parse(spec)
    place = directory / re.sub(r"[^\w.-]+", "--", name)
    with locked(place, log):
        index = _index(name, data_set, place, endpoint, log)
        train, val = _split([Shard(**shard) for shard in index["shards"]], data_set)
        if not train or not val:
            raise UserError(f"{spec} has no parquet file to {'validate on' if train else 'train on'}")
        if split == "val":
            chosen = val
        elif count is not None and count > len(train):
            raise UserError(f"{spec}: {data_set.repository} has only {len(train)} training shards; ask for fewer")
        else:
            chosen = train[: count or DEFAULT_SHARDS]
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
        raise UserError(f"unknown data set {name!r}; expected one of: {', '.join(DATA_SETS)}, or hub:OWNER/NAME")
    owner, _, rest = name.partition("/")
    repository, _, folder = rest.partition("/")
    data_set = DATA_SETS.get(name) or DataSet(f"{owner}/{repository}", folder)
    return name, data_set, int(match[2]) if match[2] else None


def _split(shards: Sequence[Shard], data_set: DataSet) -> tuple[list[Shard], list[Shard]]:
    """Training and validation files, by the data set's patterns or by words in names (else the last file validates)."""
    if data_set.train:
        train, val = (
            [shard for shard in shards if re.search(pattern, shard.path)] for pattern in (data_set.train, data_set.val)
        )
        return train, val
    words = {shard: words_of(Path(shard.path)) for shard in shards}
    val = [shard for shard in shards if words[shard] & VAL]
    others = [shard for shard in shards if not words[shard] & (VAL | TEST)]
    train = [shard for shard in others if words[shard] & TRAIN] or others
    return (train, val) if val else (train[:-1], train[-1:])


def _index(name: str, data_set: DataSet, place: Path, endpoint: str | None, log: Log) -> dict[str, Any]:
    """Commit and sorted shards of a data set, from index.json or, for the first download, from the hub."""
    known = read_json(place / "index.json")
    if known is not None:
        return known
    huggingface_hub = _library()
    api = huggingface_hub.HfApi(endpoint=endpoint)

    def query() -> dict[str, Any]:
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

    index = patiently(query, data_set.repository, threading.Event(), log, _transient())
    if len(index["shards"]) < 2 and not data_set.train:
        raise UserError(f"hub:{name} has {len(index['shards'])} parquet files; training and validation need one each")
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
    stop = threading.Event()  # set when a download fails permanently, to end the others
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=sum(shard.size for shard in shards))

        def download_one(shard: Shard) -> None:
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
            for _ in pool.map(download_one, shards):
                pass
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _is_there(path: Path, shard: Shard) -> bool:
    return path.exists() and path.stat().st_size == shard.size


def _transient() -> tuple[type[Exception], ...]:
    """Errors of the library to retry: the HTTP errors of requests or httpx, depending on the library's version."""
    bases: tuple[type[Exception], ...] = _library().errors.HfHubHTTPError.__bases__
    return bases


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError("data sets of the hub need huggingface_hub: pip install 'jaxchat[hub]'") from None
    return huggingface_hub
