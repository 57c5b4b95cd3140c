"""The cache of prepared data: keys that are content hashes, atomic writes, and locks between processes."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxchat import signals
from jaxchat.errors import UserError

Log = Callable[[str], None]


def key(**parts: Any) -> str:
    """Cache key: a hash of all parts and their values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; creates its directory."""
    make_directory(path.parent)
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically, in UTF-8; a byte of a path that is not UTF-8 is written as JSON escapes it, \\udcff."""
    # Random, because processes in different containers can have the same process id.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Renames a file or directory to the first free of NAME-1, NAME-2, ..., before its suffix; returns its new path."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def read_json(path: Path) -> Any:
    """The value of a JSON file; None if the file is missing, invalid or unreadable."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def make_directory(directory: Path, option: str = "--data.cache") -> None:
    """Creates a directory and tests that it is writable; raises `UserError` naming the `option` that sets it if not."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # Another directory need not help; the launcher reports these.
            raise
        raise UserError(f"{directory} cannot be written ({error.strerror}): choose another with {option}") from error


@contextlib.contextmanager
def locked(directory: Path, log: Log, *, refusal: str | None = None, option: str = "--data.cache") -> Iterator[None]:
    """Context manager: holds an exclusive lock on a directory, which the system releases when the process ends.

    If another process holds the lock, waits for it, or raises `UserError(refusal)` if a `refusal` is given. With a
    `refusal`, work that fails before it writes a file leaves no new directory behind. `option` is the flag that sets
    the directory.
    """
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    make_directory(directory, option)
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if refusal is not None:
                raise UserError(refusal) from None
            log(f"another process is preparing {directory}; waiting for it")
            with signals.waiting():
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            log(f"warning: {directory} cannot be locked ({error.strerror}): only one process may use it")
        try:
            yield
        except BaseException:  # Whatever ends the work, also a signal, is raised again.
            if refusal is not None and made and not any(p.is_file() for p in directory.rglob("*") if p.name != "lock"):
                shutil.rmtree(directory, ignore_errors=True)
                with contextlib.suppress(OSError):  # Something else is in one of the others.
                    for place in made[1:]:
                        place.rmdir()
            raise
