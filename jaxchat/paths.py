"""Paths that a user writes: in options, in configuration files, and in specifications such as gsm8k:DIRECTORY."""

import os
from pathlib import Path

from jaxchat.errors import UserError


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path that a user wrote, with `~` or `~name` at its start replaced by a home directory.

    Shells leave `--out=~/x` as it is. Raises `UserError` if no home directory is known.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: no such home directory is known; write the path from / on") from None


def check_local(name: str, place: str | None) -> None:
    """Raises ValueError if `place` is not a directory for runs, in which files are locked, renamed and appended to:
    a URL, or a path that is not UTF-8 (Orbax and ArrayRecord open no others)."""
    if place and "://" in place:
        raise ValueError(
            f"{name}={place} is not a directory: mount the bucket (see docs/launch) and give its directory instead"
        )
    if place and not is_utf8(user_path(place).absolute()):
        raise ValueError(f"{name}={ascii(place)[1:-1]} is not a path in UTF-8: rename it, or give another")


def is_utf8(path: Path) -> bool:
    """Whether the bytes of a path are UTF-8; Python reads others as lone surrogates."""
    try:
        str(path).encode()
        return True
    except UnicodeEncodeError:
        return False


def split_step(path: str) -> tuple[str, str]:
    """Directory and `@step` of a checkpoint's path ("" without one). Names of directories may contain an @."""
    directory, at, step = path.rpartition("@")
    return (directory, at + step) if "@" in Path(path).name and not user_path(path).is_dir() else (path, "")
