"""The cache of prepared data: keys made of content, atomic files, a lock against a second process."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxchat.data.files import Source
from jaxchat.errors import UserError

SETTLED_SECONDS = 2.0


def key(**parts: Any) -> str:
    """A name for what the parts decide; another value of any part makes another name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    make_directory(path.parent)
    # In containers every process may have the same number.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The value of a JSON file, None where it is missing, damaged or not to be read."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def make_directory(directory: Path, option: str = "--data.cache") -> None:
    """Makes a directory where files can be made; raises `UserError` naming the option that says where, if it cannot."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # The place is right, and the launcher has a sentence for it.
            raise
        raise UserError(f"{directory} cannot be written ({error.strerror}): name another {option}") from error


@contextlib.contextmanager
def locked(directory: Path, log: Callable[[str], None], *, refusal: str | None = None) -> Iterator[None]:
    """Holds the directory for this process; the lock ends with the process, however it ends.

    Where another process has it, waits, or raises `UserError` with the `refusal`.
    """
    make_directory(directory)
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if refusal is not None:
                raise UserError(refusal) from None
            log(f"another process is preparing {directory}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            log(f"warning: {directory} cannot be locked ({error.strerror}): start nothing else in it meanwhile")
        yield


def content_hashes(sources: Sequence[Source], cache_directory: Path) -> list[str]:
    """The content hash of every source; a file is read again only after its size, times or inode changed."""
    path = cache_directory / "hashes.json"
    known = read_json(path) or {}
    now = time.time()
    stamps = [_stamp(source) for source in sources]
    unknown = [
        i
        for i, (source, stamp) in enumerate(zip(sources, stamps))
        if not stamp or known.get(source.path, [])[:-1] != stamp
    ]
    with ThreadPoolExecutor(8) as pool:
        fresh = dict(zip(unknown, pool.map(lambda i: sources[i].hash(), unknown)))
    settled = {
        sources[i].path: [*stamps[i], hash_]
        for i, hash_ in fresh.items()
        # A file changed in the same tick of the file system's clock as it was read would keep its times.
        if stamps[i]
        and now - max(stamps[i][1], stamps[i][2]) / 1e9 > SETTLED_SECONDS
        and _stamp(sources[i]) == stamps[i]
    }
    if settled:
        write_json(path, (read_json(path) or {}) | settled)
    return [fresh[i] if i in fresh else known[source.path][-1] for i, source in enumerate(sources)]


def _stamp(source: Source) -> list[int]:
    if source.kind == "tinyworld":
        return []
    stat = os.stat(source.path)
    # The change time cannot be set by a program, so a file that was touched back to an old date is still seen.
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
