"""SIGTERM and Ctrl-C: they stop a run at once before its first step, and from then on once a checkpoint is saved."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
KEPT = "what was prepared so far is kept"
_received: list[int] = []  # All that came while a handler of ours stood.


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop; the message says what is kept. No `except Exception` takes it for a failure."""


@contextlib.contextmanager
def raised() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM and SIGINT raise `Interrupted`, as soon as Python runs again; SIGTERM only once.

    What is raised in the middle of a library may be swallowed there or come out as another error: any error after a
    signal leaves as `Interrupted`. The function that it gives tells whether there was a signal, one noted within too.
    """
    asked: list[int] = []
    before = len(_received)

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        if number == signal.SIGINT or len(asked) == 1:
            raise Interrupted(KEPT)

    with _handled(stop):
        try:
            yield lambda: len(_received) > before
        except Exception as error:
            if asked:
                raise Interrupted(KEPT) from error
            raise


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM and SIGINT only set a flag that the returned function tells; a second SIGINT stops at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    with _handled(note):
        yield lambda: bool(asked)


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    def receive(number: int, frame: Any) -> None:
        _received.append(number)
        handler(number, frame)

    before = {number: signal.signal(number, receive) for number in STOPPING}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
