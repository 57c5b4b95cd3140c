"""Runs launchers: prints the result as one line of JSON and a `UserError` as one sentence."""

import contextlib
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from jaxchat import signals
from jaxchat.errors import UserError, first_line
from jaxchat.serialization import json_line


def log(text: str) -> None:
    """Prints a line to stderr, as long as that has a reader; stdout is reserved for the launcher's result."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def _unraisable(problem: Any) -> None:
    """Reports an exception that Python cannot raise, but not those of TensorStore for writes after a failed one."""
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


def sentence(error: BaseException) -> str | None:
    """The message of an error that the user can correct: a `UserError`, a full disk, a backend that does not start."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what = f"{error.filename} cannot be written" if error.filename else "a file cannot be written"
        return f"{what} ({error.strerror}): free some space and start again"
    text, name = re.split(r" \((?:you may|set JAX)", first_line(error))[0], os.environ.get("JAX_PLATFORMS")
    # Where no other backend is left, JAX fails on an assertion.
    own = isinstance(error, AssertionError) and "xla_bridge" in traceback.extract_tb(error.__traceback__)[-1].filename
    if name and (own or text.startswith(("Unable to initialize backend", "Unknown backend"))):
        reason = "there is no such device" if own else text
        return f"JAX cannot start with JAX_PLATFORMS={name} ({reason}): unset it, or set JAX_PLATFORMS=cpu"
    return _unread_variable(error)


def _unread_variable(error: BaseException) -> str | None:
    """A sentence if JAX cannot read one of its environment variables; JAX's message may name several, or none."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and any(frame.filename.endswith("jax/_src/config.py") for frame in frames):
        for name, value in os.environ.items():
            if name.startswith("JAX_") and (name in str(error).upper() or repr(value) in str(error)):
                return f"JAX does not know the value of {name}={value}: correct it, or unset {name}"
    return None


def run(main: Callable[[list[str]], Mapping[str, Any] | None], *, resumes: bool = False) -> None:
    """Runs a launcher and prints its result as JSON.

    Exits with 2 on a `UserError` or full disk. If SIGTERM or Ctrl-C came before the result was printed, exits with 75
    if the command continues its work when it is started again (`resumes`), otherwise with 130.
    """
    for stream in (sys.stdin, sys.stdout):  # Invalid input or an unprintable character must not stop the program.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.unraisablehook = _unraisable
    try:
        with signals.handled():
            signals.check()
            result = main(sys.argv[1:])
            signals.check()
            if result is not None:
                print(json_line(result, ascii_only=False), flush=True)
    except BrokenPipeError:  # The reader closed the pipe; without devnull, Python would report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:  # All but what a user can correct is raised again.
        if (problem := sentence(error)) is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        kept = f"; {stop or signals.KEPT}: start again to continue" if resumes else ""
        print(f"stopped by a signal{kept}", file=sys.stderr)
        raise SystemExit(signals.EXIT_RESTART if resumes else signals.EXIT_STOPPED) from None
