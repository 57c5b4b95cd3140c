"""What every launcher does: prints its result as one line of JSON, and a user's mistake as one sentence."""

import errno
import io
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from jaxchat.errors import UserError
from jaxchat.serialization import json_line


def log(text: str) -> None:
    """A line for whoever runs a launcher; stdout is for its result."""
    print(text, file=sys.stderr, flush=True)


def run(main: Callable[[list[str]], Mapping[str, Any] | None]) -> None:
    """Runs a launcher: prints its result as one line of JSON, or a user's mistake as one sentence (exit status 2)."""
    for stream in (sys.stdin, sys.stdout):  # What is no text, or what a terminal cannot show, is no reason to stop.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        result = main(sys.argv[1:])
        if result is not None:
            print(json_line(result, ascii_only=False), flush=True)
    except BrokenPipeError:  # Whoever read the output has seen enough; Python would complain again at its end.
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
