"""Handles SIGTERM and Ctrl-C: before its first step a run stops at once, later after saving a checkpoint."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
KEPT = "prepared data is kept"
_received: list[int] = []  # all signals that arrived while one of these handlers was installed


class Interrupted(KeyboardInterrupt):
    """A signal stops the run; the message says what is kept. `except Exception` does not catch it as a failure."""


@contextlib.contextmanager
def raised() -> Iterator[Callable[[], bool]]:
    """Context manager: SIGTERM and SIGINT raise `Interrupted`; a SIGTERM after another signal is only recorded.

    A library may swallow the exception or turn it into another one, so any error after a signal is converted to
    `Interrupted`. Yields a function that returns whether a signal has arrived, also within a nested `noted`.
    """
    signals: list[int] = []
    before = len(_received)

    def stop(number: int, frame: Any) -> None:
        signals.append(number)
        if number == signal.SIGINT or len(signals) == 1:
            raise Interrupted(KEPT)

    with _handled(stop):
        try:
            yield lambda: len(_received) > before
        except Exception as error:
            if signals:
                raise Interrupted(KEPT) from error
            raise


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Context manager: signals only set a flag, which the yielded function returns; a second SIGINT raises at once."""
    signals: list[int] = []

    def note(number: int, frame: Any) -> None:
        if signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.append(number)

    with _handled(note):
        yield lambda: bool(signals)


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
