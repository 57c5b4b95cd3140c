"""Runs launchers: prints the result as one line of JSON and a `UserError` as one sentence."""

import errno
import io
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from jaxchat import signals
from jaxchat.errors import UserError
from jaxchat.serialization import json_line


def log(text: str) -> None:
    """Prints a line to stderr; stdout is reserved for the launcher's result."""
    print(text, file=sys.stderr, flush=True)


def run(main: Callable[[list[str]], Mapping[str, Any] | None], *, resumes: bool = False) -> None:
    """Runs a launcher and prints its result as JSON.

    Exits with 2 on a `UserError` or full disk. If SIGTERM or Ctrl-C came before the result was printed, exits with 75
    if the command continues its work when it is started again (`resumes`), otherwise with 130.
    """
    for stream in (sys.stdin, sys.stdout):  # Invalid input or an unprintable character must not stop the program.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
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
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = f"{error.filename} cannot be written" if error.filename else "a file cannot be written"
        print(f"error: {what} ({error.strerror}): free some space and start again", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        kept = f"; {stop or signals.KEPT}: start again to continue" if resumes else ""
        print(f"stopped by a signal{kept}", file=sys.stderr)
        raise SystemExit(signals.EXIT_RESTART if resumes else signals.EXIT_STOPPED) from None
