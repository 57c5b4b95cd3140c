"""What each start of a stage ran on and how long it took: starts.json in the stage directory."""

import contextlib
import datetime
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxchat import checkpoint, integrity, machine
from jaxchat.data.cache import read_json, set_aside, write_json

FILE = "starts.json"
CLOCK_SECONDS = 5.0  # Interval of writing a start's time; a kill loses at most so much.


def read(directory: Path) -> list[dict[str, Any]]:
    """The starts of a stage, oldest first; empty if there is no file or it is damaged.

    The `seconds` of a start that was killed may lack its last CLOCK_SECONDS.
    """
    starts = read_json(directory / FILE)
    return starts if isinstance(starts, list) else []


def facts(began: float) -> dict[str, Any]:
    """Date of `began` (a `time.monotonic()`), command, code, versions and machine of this process."""
    main = Path(sys.argv[0])
    program = f"python -m {main.parent.name}.{main.stem}" if main.parent.name == "launch" else main.name
    device, ago = jax.devices()[0], datetime.timedelta(seconds=time.monotonic() - began)
    return {
        "started": (datetime.datetime.now(datetime.UTC) - ago).isoformat(timespec="seconds"),
        "command": shlex.join([*program.split(), *sys.argv[1:]]),
        **machine.surroundings(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
    }


@contextlib.contextmanager
def recorded(directory: Path, began: float) -> Iterator[None]:
    """Context manager: appends this start to starts.json, with its seconds since `began` (a `time.monotonic()`).

    The seconds are written every `CLOCK_SECONDS` and at the end. Only process 0 writes.
    """
    if jax.process_index():
        yield
        return
    earlier, about, done = read(directory), facts(began), threading.Event()

    def note() -> None:
        taken = round(time.monotonic() - began, 1)
        with contextlib.suppress(OSError):  # A full disk is reported by what the run itself writes.
            write_json(directory / FILE, [*earlier, {**about, "seconds": taken}])

    def beat() -> None:
        while not done.wait(CLOCK_SECONDS):
            note()

    note()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        note()


def keep_records(directory: Path, log: Any) -> None:
    """Renames the records of a stage whose checkpoints were removed, because a new run would overwrite them."""
    if checkpoint.finished_steps(directory) or not read_json(directory / integrity.SIZES):
        return
    for path in (directory / name for name in ("metrics.jsonl", "samples.md", "tensorboard")):
        if path.exists():
            log(f"{directory / checkpoint.CHECKPOINTS} was removed: its {path.name} is kept as {set_aside(path).name}")
    (directory / integrity.SIZES).unlink()
