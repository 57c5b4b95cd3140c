"""File access limits (Linux Landlock) that a process sets on itself, irrevocably and without privileges.

Used where bubblewrap does not work, as in most containers. Constants: include/uapi/linux/landlock.h.
"""

import ctypes
import os
import struct
from collections.abc import Sequence

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_RUN, _READ, _LIST = 1, 4, 8
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # All access rights by Landlock ABI version.
_NO_NEW_PRIVILEGES = 38


def confine(readable: Sequence[str], listed: Sequence[str]) -> None:
    """Restricts this process to reading and executing below `readable`, and listing below `listed`.

    Does nothing if the kernel does not support Landlock; the probe in `run.py` measures what holds.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    every = _RIGHTS[min(version, max(_RIGHTS))]
    # ABI 4 adds TCP; ABI 6 adds signals to, and abstract sockets of, other processes.
    handled = [every] + [3] * (version >= 4) + [3] * (version >= 6)
    rules = libc.syscall(_CREATE, struct.pack(f"={len(handled)}Q", *handled), ctypes.c_size_t(8 * len(handled)), 0)
    if rules < 0:
        return
    for path, rights in [(path, _RUN | _READ | _LIST) for path in readable] + [(path, _LIST) for path in listed]:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights &= every if os.path.isdir(path) else _RUN | _READ
        libc.syscall(_ADD, rules, 1, struct.pack("=Qi", rights, place), 0)  # If it fails, the path is not readable.
        os.close(place)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.syscall(_RESTRICT, rules, 0)
    os.close(rules)


def without(path: str, hidden: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a tree into paths that contain nothing of `hidden`, and the directories between them."""
    if path in hidden:
        return [], []
    if not any(place.startswith(path + "/") for place in hidden):
        return [path], []
    parts, between = [], [path]
    for entry in os.scandir(path):
        if entry.is_symlink():
            continue  # A rule would apply to the target of the link.
        below = without(entry.path, hidden)
        parts += below[0]
        between += below[1]
    return parts, between
