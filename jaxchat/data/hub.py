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
`DATA_SETS`, words in file names decide the split: without validation files, the last of several training shards is
held out; if there is only one, the test files validate. Otherwise test files are not read. The list of files is fixed
at the commit of the first download, so that a data set cannot change during a run; downloaded files need no network.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxchat import signals
from jaxchat.data.cache import Log, locked, read_json, write_json
from jaxchat.data.source import TEST, Content, Kind, Split, by_words
from jaxchat.errors import UserError, first_line, missing
from jaxchat.launcher import log

DEFAULT_SHARDS = 8
AT_ONCE = 4
RETRY_SECONDS = (1.0, 5.0, 25.0)  # Waits before a download is tried again after an error of the server.


@dataclass(frozen=True)
class DataSet:
    """A data set, and regular expressions for its training and validation files; `_split` is used if they are empty."""

    repository: str
    folder: str = ""
    train: str = ""
    val: str = ""


@dataclass(frozen=True)
class Shard:
    """A file of a data set: its path there, its size in bytes, and its hexadecimal SHA-256 if the hub states one."""

    path: str
    size: int
    sha256: str | None

    def file(self, place: Path) -> Path:
        """The path of the downloaded file."""
        return place / self.path.replace("/", "--")


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


class Hub(Kind):
    """Files of the hub's data sets."""

    mark = "hub:"

    def find(self, spec: str, split: Split, content: Content, downloads: Path | None, log: Log) -> list[Path]:
        if downloads is None:
            raise UserError(f"{spec} needs a cache directory to download to")
        return download(spec, split, downloads, log=log)


def download(spec: str, split: str, directory: Path, *, log: Log = log, endpoint: str | None = None) -> list[Path]:
    """Downloads the missing files of a spec and split; returns the paths of all its files."""
    name, data_set, count = _parse(spec)
    place = directory / re.sub(r"[^\w.-]+", "--", name)
    with locked(place, log):
        index = _index(name, data_set, place, endpoint, log)
        train, val = _split([Shard(**shard) for shard in index["shards"]], data_set)
        if not train and split == "train":
            raise UserError(f"{spec} has no parquet file to train on")
        if split == "val":
            if not val:
                problem = (
                    f"{spec} has no parquet file to validate on: leave --data.val out to hold out documents of train"
                )
                raise UserError(problem)
            chosen = val
        elif count is not None and count > len(train):
            raise UserError(f"{spec}: {data_set.repository} has only {len(train)} training shards; ask for fewer")
        else:
            chosen = train[: count or DEFAULT_SHARDS]
        missing = [shard for shard in chosen if not _is_there(shard, place)]
        if missing:
            size = sum(shard.size for shard in missing) / 1e9
            log(f"downloading {len(missing)} shards of {data_set.repository} ({size:.2f} GB) to {place}")
            pool = ThreadPoolExecutor(AT_ONCE)
            try:
                with signals.waiting():
                    list(pool.map(partial(_fetch, data_set.repository, index["commit"], place, endpoint), missing))
            finally:
                pool.shutdown(cancel_futures=True)
    return [shard.file(place) for shard in chosen]


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
    """Training and validation files, by the data set's patterns or by words in names.

    Without validation files, the last of several training files validates, or else the test files.
    """
    if data_set.train:
        train, val = (
            [shard for shard in shards if re.search(pattern, shard.path)] for pattern in (data_set.train, data_set.val)
        )
        return train, val
    train, val = by_words([(shard.path, shard) for shard in shards])
    if not val and len(train) > 1:
        return train[:-1], train[-1:]
    return train, val or by_words([(shard.path, shard) for shard in shards], TEST)[1]


def _index(name: str, data_set: DataSet, place: Path, endpoint: str | None, log: Log) -> dict[str, Any]:
    """Commit and sorted shards of a data set, from index.json or, for the first download, from the hub."""
    known = read_json(place / "index.json")
    if known is not None:
        return known
    with _one_sentence(data_set.repository) as library:
        api = library.HfApi(endpoint=endpoint)
        commit = api.dataset_info(data_set.repository).sha
        tree = api.list_repo_tree(
            data_set.repository,
            data_set.folder or None,
            repo_type="dataset",
            revision=commit,
            recursive=name not in DATA_SETS,
        )
        files = sorted((file for file in tree if file.path.endswith(".parquet")), key=lambda file: file.path)
    if not files:
        raise UserError(f"hub:{name} has no parquet files: download it, and name its .jsonl or .txt files instead")
    log(f"hub:{name} is {data_set.repository} at {commit}, {len(files)} shards")
    shards = [Shard(file.path, file.size, file.lfs.sha256 if file.lfs else None) for file in files]
    index = {"commit": commit, "shards": [asdict(shard) for shard in shards]}
    write_json(place / "index.json", index)
    return index


def _fetch(repository: str, commit: str, place: Path, endpoint: str | None, shard: Shard) -> None:
    """Downloads a shard. The library resumes after a broken connection, waits if the hub is busy and checks the size;
    after an error of the server the download is tried again."""
    with _one_sentence(f"{shard.path} of {repository}") as library:
        get = partial(library.hf_hub_download, repository, shard.path, repo_type="dataset", revision=commit)
        for wait in (*RETRY_SECONDS, None):
            try:
                path = Path(get(local_dir=place, endpoint=endpoint))
                break
            except Exception as error:  # All but an error of the server is raised again.
                if wait is None or (_status(error) or 0) < 500:
                    raise
                time.sleep(wait)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if shard.sha256 not in (None, sha256):
        path.unlink()
        raise UserError(f"{shard.path} of {repository} has another checksum than the hub states; start again")
    path.replace(shard.file(place))


def _is_there(shard: Shard, place: Path) -> bool:
    path = shard.file(place)
    return path.exists() and path.stat().st_size == shard.size


def _status(error: Exception) -> int | None:
    """HTTP status of the response that caused an error; None if there was no response."""
    return getattr(getattr(error, "response", None), "status_code", None)


@contextlib.contextmanager
def _one_sentence(what: str) -> Iterator[Any]:
    """Context manager: returns the library huggingface_hub, and turns its errors into a `UserError` about `what`."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise missing("data sets of the hub need huggingface_hub", "hub") from None
    # The bases are OSError and the HTTP errors of requests or httpx, depending on the library's version.
    failures: Any = OSError, *HfHubHTTPError.__bases__
    try:
        yield huggingface_hub
    except failures as error:
        status = _status(error)
        if status in (401, 403):
            hint = "set HF_TOKEN to a token with read access, and accept the terms on its page"
        elif status == 404:
            hint = "check its name"
        else:
            hint = "start again to continue with the files that are missing, or use local files"
        raise UserError(f"{what} cannot be downloaded ({status or first_line(error)}): {hint}") from None
