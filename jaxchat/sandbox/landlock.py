"""A limit on which files a process reaches (Linux: Landlock), which it puts on itself for good, without privileges.

For where neither bubblewrap nor namespaces work, in most containers. Numbers: include/uapi/linux/landlock.h.
"""

import ctypes
import os
import struct
from collections.abc import Sequence

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_RUN, _READ, _LIST = 1, 4, 8
_OF_FILES = _RUN | 2 | _READ | 1 << 14
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # by version of the interface, from which on
_NO_NEW_PRIVILEGES = 38


def confine(readable: Sequence[str], listed: Sequence[str], own: str) -> bool:
    """Leaves a process what is below `readable`, names below `listed`, and all rights below `own`.

    False where the kernel does not have it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    every = _RIGHTS[min(version, max(_RIGHTS))]
    # TCP from version 4, signals and abstract sockets of other processes from version 6.
    words = [every] + [3] * (version >= 4) + [3] * (version >= 6)
    rules = libc.syscall(_CREATE, struct.pack(f"={len(words)}Q", *words), ctypes.c_size_t(8 * len(words)), 0)
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
    """The parts of a tree that hold nothing hidden, and the folders that lie between."""
    if path in hidden:
        return [], []
    if not any(place.startswith(path + "/") for place in hidden):
        return [path], []
    parts, between = [], [path]
    for entry in os.scandir(path):
        if entry.is_symlink():
            continue  # A rule would be about what it leads to.
        below = without(entry.path, hidden)
        parts += below[0]
        between += below[1]
    return parts, between
