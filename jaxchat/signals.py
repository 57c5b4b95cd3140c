"""SIGTERM and Ctrl-C, handled in the same way by all launchers: acknowledged at once, acted upon at the next check.

No handler raises an exception while the program works. XLA calls Python while it compiles, and an exception that a
handler raised there ended the process with a segmentation fault or was swallowed (jax#18246). Python runs its handlers
in the main thread only, which may be busy in XLA for a minute; so a thread acknowledges the signal, which it gets from
the C handler through a pipe (`signal.set_wakeup_fd`), and ends the process on a second one.
"""

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
EXIT_RESTART = 75  # EX_TEMPFAIL: a scheduler should start the command again, which then continues.
EXIT_STOPPED = 130  # Stopped by a signal; starting again begins anew. A second signal ends with 128 + its number.
KEPT = "what was finished is kept"
REPEAT_SECONDS = 1.0  # Within this time a further signal counts as the same one: `timeout` sends SIGTERM twice.
HEARD = "{name} received: stopping when it is safe (a compilation is finished first); a second signal ends at once"

_received: list[int] = []
_mode = {"listening": False, "ended": False, "waiting": False, "deferred": False}
_forgotten = [0]  # How often the received signals were marked as handled.


class Interrupted(KeyboardInterrupt):
    """A signal stops the work; the message says what is kept. `except Exception` does not catch it as a failure."""


def listen() -> Callable[[], None]:
    """Installs handlers of SIGTERM and SIGINT, in the main thread; returns a function that restores the old ones."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _receive) for number in STOPPING}
    thread = threading.Thread(target=_acknowledge, args=(reading,), name="signals", daemon=True)
    thread.start()
    atexit.register(_ignore)
    _mode.update(listening=True, ended=False)

    def end() -> None:
        atexit.unregister(_ignore)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd)
        os.close(writing)
        thread.join()
        _mode["listening"] = False
        forget()

    return end


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Context manager: `listen`, unless the handlers are installed already or this is not the main thread."""
    if _mode["listening"] or threading.current_thread() is not threading.main_thread():
        try:
            yield
        finally:
            _mode["ended"] = True  # The result is printed; only the interpreter's exit is left.
        return
    end = listen()
    try:
        yield
    finally:
        end()


def _ignore() -> None:
    """Ignores signals while the interpreter ends: Python gives its handlers up then, and the exit status is decided."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _receive(number: int, frame: Any) -> None:
    _received.append(number)
    if _mode["waiting"] and not _mode["deferred"]:
        raise Interrupted(KEPT)


def _acknowledge(reading: int) -> None:
    """Reports the first signal on stderr; ends the process on one that comes `REPEAT_SECONDS` later."""
    first, forgotten = 0.0, -1
    while byte := os.read(reading, 1):
        if byte[0] not in STOPPING:
            continue
        now, name = time.monotonic(), signal.Signals(byte[0]).name
        if forgotten != _forgotten[0]:
            first, forgotten = now, _forgotten[0]
            if not _mode["ended"]:
                os.write(2, f"{HEARD.format(name=name)}\n".encode())
        elif now - first > REPEAT_SECONDS:
            os.write(2, f"{name} received again: ended at once\n".encode())
            os._exit(128 + byte[0])
    os.close(reading)


def received() -> list[int]:
    """The signals that arrived since `listen` or `forget`."""
    return list(_received)


def forget() -> None:
    """Marks the received signals as handled."""
    _forgotten[0] += 1
    _received.clear()


def check() -> None:
    """Raises `Interrupted` if a signal arrived, except within `deferred`. Long work calls it wherever it may end."""
    if _received and not _mode["deferred"]:
        raise Interrupted(KEPT)


@contextlib.contextmanager
def deferred(on: bool = True) -> Iterator[None]:
    """Context manager: `check` does nothing, because the work within asks for `received` where it can stop."""
    before, _mode["deferred"] = _mode["deferred"], on
    try:
        yield
    finally:
        _mode["deferred"] = before


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Context manager around a wait of unknown length in Python alone, for input or a lock: a signal ends it."""
    _mode["waiting"] = True
    try:
        check()
        yield
    finally:
        _mode["waiting"] = False
