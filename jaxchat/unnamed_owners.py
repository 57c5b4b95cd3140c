"""Lets Orbax read files of users and groups that have no name, as in containers (etils#790)."""

import os
import stat
from typing import Any

from etils.epath import backend, gpath, stat_utils


class _Local(type(backend.os_backend)):  # type: ignore[misc]
    """Local files. etils looks up the owner's name, and raises KeyError if there is none."""

    def stat(self, path: Any) -> stat_utils.StatResult:
        try:
            return super().stat(path)
        except KeyError:
            found = os.stat(path)
            mode, time = found.st_mode, int(found.st_mtime)
            return stat_utils.StatResult(stat.S_ISDIR(mode), length=found.st_size, mtime=time, mode=mode)


def allow() -> None:
    """Replaces the local files of etils."""
    gpath._PREFIX_TO_BACKEND[None] = _Local()
