"""Process that runs the untrusted program: it restricts itself, then answers calls. Its output is never trusted."""

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
    """Reads the program and its limits from descriptor 0, then reads calls there and answers them on descriptor 1."""
    calls, answers = os.dup(0), os.dup(1)
    os.dup2(2, 0), os.dup2(2, 1)  # Descriptor 2 is /dev/null, opened for reading and writing.
    setup = receive(calls, 1 << 30)
    shut(setup)
    send(answers, "ready")
    try:
        module = types.ModuleType("candidate")
        sys.modules["candidate"] = module  # Dataclasses look up the module in which they are defined.
        exec(compile(setup["program"], "candidate", "exec"), module.__dict__)
        function: Any = module.__dict__[setup["entry_point"]]
    except BaseException as error:  # The program is not ours, and may raise SystemExit too.
        send(answers, [0, "error", type(error).__name__])
        return
    while True:
        number, arguments, keywords = receive(calls, 1 << 30)
        answer: list[Any]
        try:
            answer = [number, "value", encode(function(*decode(arguments), **decode(keywords)))]
        except BaseException as error:  # As above.
            answer = [number, "error", type(error).__name__]
        send(answers, answer)


def shut(setup: Mapping[str, Any]) -> None:
    """Applies the resource limits of `setup` and drops all privileges irrevocably."""
    limits = {
        "AS": setup["memory_bytes"],
        "CPU": setup["cpu_seconds"],
        "FSIZE": 0,
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
        # RLIMIT_NPROC counts the processes of a user and does not apply to root.
        os.setgroups([])
        os.setresgid(*[setup["user"]] * 3)
        os.setresuid(*[setup["user"]] * 3)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # Writing beyond RLIMIT_FSIZE raises OSError instead.
    die_with_parent()
    if sys.platform == "linux":
        drop_capabilities()
        if setup["files"] is not None:
            landlock.confine(*setup["files"])
        calls_filter.close()


def drop_capabilities() -> None:
    """Drops all capabilities, because the process may still run as root if no other user is available."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def lower(kind: int, limit: int) -> None:
    """Sets soft and hard resource limit `kind` to `limit`, or to the current hard limit if that is lower."""
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies. A change of user id resets this setting."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
