"""The process that runs the program: it shuts itself in, then answers calls. Nothing that it says is trusted."""

import ctypes
import os
import resource
import signal
import sys
import types
from collections.abc import Mapping
from typing import Any

from jaxchat.sandbox import filter as calls_filter
from jaxchat.sandbox import landlock
from jaxchat.sandbox.literals import decode, encode, receive, send

_PARENT_DEATH_SIGNAL = 1


def main() -> None:
    """Reads one message with the program and its limits from descriptor 0, then answers calls on descriptor 1."""
    calls, answers = os.dup(0), os.dup(1)
    os.dup2(2, 0), os.dup2(2, 1)  # Descriptor 2 is /dev/null, for reading too.
    setup = receive(calls, 1 << 30)
    shut(setup)
    send(answers, "ready")
    try:
        module = types.ModuleType("candidate")
        sys.modules["candidate"] = module  # Dataclasses look their module up.
        exec(compile(setup["program"], "candidate", "exec"), module.__dict__)
        function: Any = module.__dict__[setup["entry_point"]]
    except BaseException as error:
        send(answers, [0, "error", type(error).__name__])
        return
    while True:
        number, arguments, keywords = receive(calls, 1 << 30)
        answer: list[Any]
        try:
            answer = [number, "value", encode(function(*decode(arguments), **decode(keywords)))]
        except BaseException as error:
            answer = [number, "error", type(error).__name__]
        send(answers, answer)


def shut(setup: Mapping[str, Any]) -> None:
    """Gives up rights for good."""
    limits = {
        "AS": setup["memory_bytes"],
        "CPU": setup["cpu_seconds"],
        "FSIZE": setup["file_bytes"],
        "NOFILE": setup["open_files"],
        "NPROC": 0,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            lower(kind, limit)
    if setup["user"] is not None:
        # The number of processes is counted by user, and root's are not limited.
        os.setgroups([])
        os.setresgid(*[setup["user"]] * 3)
        os.setresuid(*[setup["user"]] * 3)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Too large a file is an error, as a full disk is.
    if sys.platform == "linux":
        drop_capabilities()
        die_with_parent()
        if setup["files"] is not None:
            landlock.confine(*setup["files"])
        calls_filter.close()


def drop_capabilities() -> None:
    """Gives up what is left to root: its name may remain where no other user can be had."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def lower(kind: int, limit: int) -> None:
    """Sets a limit of this process, unless a lower one is in force."""
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def die_with_parent() -> None:
    """Asks the kernel to end this process when its parent ends; a change of user forgets it."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
