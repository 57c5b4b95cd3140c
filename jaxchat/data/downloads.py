"""Downloads that resume, retry with growing pauses, and verify size and checksum."""

import hashlib
import http.client
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxchat.data.cache import locked
from jaxchat.errors import UserError

ATTEMPTS = 6
BACKOFF_SECONDS = 1.0  # before the second attempt, doubled before each further one
TIMEOUT_SECONDS = 30.0
CHUNK = 1 << 20

Log = Callable[[str], None]


@dataclass(frozen=True)
class Shard:
    """A file of a data set: its path there, its size in bytes, and its hexadecimal SHA-256 if the source gives one."""

    path: str
    size: int
    sha256: str | None

    @property
    def name(self) -> str:
        return self.path.replace("/", "--")


class Corrupt(Exception):
    """The size or checksum of a download is wrong; it is tried again."""


def fetch(
    url: str,
    shard: Shard,
    place: Path,
    stop: threading.Event,
    *,
    headers: Mapping[str, str] | None = None,
    show: Callable[[int], None] = lambda size: None,
) -> None:
    """Tries once to download a shard to `place`, resuming a partial file; calls `show` with the bytes received.

    Raises `Corrupt` for a wrong size or checksum, OSError or HTTPException for a network error, and `UserError` if
    `stop` is set.
    """
    partial = place / f"{shard.name}.{(shard.sha256 or 'unknown')[:12]}.partial"
    have = partial.stat().st_size if partial.exists() else 0
    if have < shard.size:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        for name, value in (headers or {}).items():
            # The hub redirects to storage with signed URLs, which must not receive the token.
            request.add_unredirected_header(name, value)
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            resumed = have > 0 and answer.status == http.HTTPStatus.PARTIAL_CONTENT
            show(have if resumed else 0)
            with partial.open("ab" if resumed else "wb") as file:
                while block := answer.read(CHUNK):
                    if stop.is_set():
                        raise UserError("download stopped; start again to continue it")
                    file.write(block)
                    show(len(block))
    have = partial.stat().st_size
    if have < shard.size:
        raise http.client.IncompleteRead(b"", shard.size - have)
    if have > shard.size or (shard.sha256 and _sha256(partial) != shard.sha256):
        partial.unlink()
        raise Corrupt(f"{shard.path} has another size or checksum than its source states")
    partial.replace(place / shard.name)


def patiently(
    attempt: Callable[[], Any], what: str, stop: threading.Event, log: Log, also: tuple[type[Exception], ...] = ()
) -> Any:
    """Calls `attempt` until it succeeds, with growing pauses; retries network errors, `Corrupt` and errors of `also`.

    Raises `UserError` if the server rejects the request, the last attempt fails, or `stop` is set.
    """
    transient: tuple[type[Exception], ...] = (OSError, http.client.HTTPException, Corrupt, *also)
    for i in range(ATTEMPTS):
        try:
            return attempt()
        except transient as error:
            status = _status(error)
            if status is not None and 400 <= status < 500 and status not in (408, 429):
                raise UserError(f"{what} was refused ({status}): {_hint(status)}") from None
            if i == ATTEMPTS - 1:
                raise UserError(
                    f"{what} could not be fetched in {ATTEMPTS} attempts ({error or type(error).__name__}); "
                    "start again to continue, or use local files"
                ) from None
            pause = BACKOFF_SECONDS * 2**i
            log(f"{what}: {error or type(error).__name__}; retrying in {pause:g} s")
        if stop.wait(pause):
            raise UserError("download stopped; start again to continue it")
    raise AssertionError("unreachable")


def unpacked(url: str, place: Path, *, log: Log) -> Path:
    """Downloads a zip archive and unpacks it to the directory `place`, unless that exists; returns `place`.

    Raises:
        UserError: the file cannot be downloaded, or is not a complete zip archive.
    """
    with locked(place.parent, log):
        if place.is_dir():
            return place
        stop = threading.Event()
        size = patiently(lambda: _size(url), url, stop, log)
        shard = Shard(place.name + ".zip", size, None)
        archive = place.parent / shard.name
        if not archive.exists():
            log(f"downloading {url} ({size / 1e6:.0f} MB) to {archive}")
            patiently(lambda: fetch(url, shard, place.parent, stop), url, stop, log)
        partial = place.with_name(place.name + ".partial")
        try:
            with zipfile.ZipFile(archive) as file:
                file.extractall(partial)  # Verifies checksums and writes nothing outside the directory.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            archive.unlink()
            raise UserError(f"{url} sent an incomplete or invalid zip archive ({error}): start again") from None
        partial.replace(place)
        archive.unlink()
        return place


def _size(url: str) -> int:
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_SECONDS) as answer:
        size = answer.headers["Content-Length"]
    if size is None:
        raise UserError(f"{url} does not state its size: download and unpack it yourself and pass the directory")
    return int(size)


def _status(error: BaseException) -> int | None:
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _hint(status: int) -> str:
    if status in (401, 403):
        return "set HF_TOKEN to a token with read access, and accept the terms on its page"
    return "check its name"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
