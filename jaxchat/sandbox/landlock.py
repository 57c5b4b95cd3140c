"""File access limits (Linux Landlock) that a process sets on itself, irrevocably and without privileges.

Used where neither bubblewrap nor namespaces work, as in most containers. Constants: include/uapi/linux/landlock.h.
"""

import ctypes
import os
import struct
from collections.abc import Sequence

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_RUN, _READ, _LIST = 1, 4, 8
_OF_FILES = _RUN | 2 | _READ | 1 << 14
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # All access rights by Landlock ABI version.
_NO_NEW_PRIVILEGES = 38


def confine(readable: Sequence[str], listed: Sequence[str], own: str) -> bool:
    """Restricts this process to reading and executing below `readable`, listing below `listed`, all rights below `own`.

    Returns False if the kernel does not support Landlock or a rule fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    every = _RIGHTS[min(version, max(_RIGHTS))]
    # ABI 4 adds TCP; ABI 6 adds signals to, and abstract sockets of, other processes.
    handled = [every] + [3] * (version >= 4) + [3] * (version >= 6)
    rules = libc.syscall(_CREATE, struct.pack(f"={len(handled)}Q", *handled), ctypes.c_size_t(8 * len(handled)), 0)
    if rules < 0:
        return False
    wanted = [(path, _RUN | _READ | _LIST) for path in readable] + [(path, _LIST) for path in listed] + [(own, every)]
    for path, rights in wanted:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights &= every if os.path.isdir(path) else _OF_FILES & every
        added = libc.syscall(_ADD, rules, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
        if added:
            os.close(rules)
            return False
    done = libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0 and libc.syscall(_RESTRICT, rules, 0) == 0
    os.close(rules)
    return done


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
