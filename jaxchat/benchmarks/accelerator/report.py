"""The file that a run leaves behind: whole and valid after every row."""

import importlib.metadata
import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxchat import devices
from jaxchat.benchmarks.train import machine
from jaxchat.errors import UserError, first_line
from jaxchat.launcher import log
from jaxchat.serialization import json_line

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL", "XLA_PYTHON_CLIENT_MEM_FRACTION")


class Clock:
    """How many seconds are left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    def part(self, seconds: float) -> "Clock":
        """The next so many seconds, but no more than are left."""
        return Clock(min(seconds, self.left()))


class Report:
    """Facts of the run and rows by section; every change is on disk before the next measurement begins."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path, self._lock, self._start, self._begun = path, threading.RLock(), time.monotonic(), 0.0
        self.content: dict[str, Any] = {**facts, "seconds": 0.0, "sections": {}}
        self.write()

    def begin(self, section: str) -> None:
        self._begun = time.monotonic()
        self.change(section, {"status": "running", "seconds": 0.0, "rows": []})

    def change(self, section: str, values: Mapping[str, Any]) -> None:
        """Sets values of a section."""
        with self._lock:
            self.content["sections"].setdefault(section, {"rows": []}).update(values)
            self.write()

    def add(self, section: str, row: Mapping[str, Any]) -> None:
        with self._lock:
            self.content["sections"][section]["rows"].append(dict(row))
            self.change(section, {"seconds": round(time.monotonic() - self._begun, 2)})

    def end(self, section: str, status: str, error: str | None = None) -> None:
        told = {"status": status, "seconds": round(time.monotonic() - self._begun, 2)}
        self.change(section, told if error is None else {**told, "error": error})

    def stop(self, why: str) -> None:
        """Marks what was running as cut off."""
        with self._lock:
            for name, told in self.content["sections"].items():
                if told["status"] == "running":
                    self.end(name, "cut off", why)

    def good(self, section: str) -> list[dict[str, Any]]:
        """The rows of a section that were measured."""
        return [row for row in self.content["sections"].get(section, {"rows": []})["rows"] if "error" not in row]

    def write(self) -> None:
        """Writes the whole file beside the old one and puts it in its place."""
        with self._lock:
            self.content["seconds"] = round(time.monotonic() - self._start, 2)
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_text(json_line(self.content) + "\n", encoding="utf-8")
            temporary.replace(self._path)


def free_place(path: Path) -> Path:
    """`path`, with what an earlier run left there moved beside it; raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
            kept = next(name for name in names if not name.exists())
            path.rename(kept)
            log(f"{path} of an earlier run is kept as {kept}")
        path.touch()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({first_line(error)}): name another file with --out") from None
    return path


class Rows:
    """The rows of one section: the first wherever there is time for one, others while its share of the budget lasts."""

    def __init__(self, report: Report, section: str, whole: Clock, *, share: float, least: float) -> None:
        self._report, self._section, self._whole, self._least = report, section, whole, least
        self._tried, self.clock = 0, whole.part(share)

    def _late(self) -> str:
        """Why the next row is not begun; empty where it is."""
        if self._whole.left() < self._least:
            return f"{max(0.0, self._whole.left()):.0f} s of the budget are left, a row may need {self._least:.0f}"
        return "its share of the budget is used up" if self._tried and self.clock.left() <= 0 else ""

    def attempt(self, label: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Adds the row of `label` and what `measure` gives, or its error in one line; without time left, says so."""
        told = f"{self._section} " + " ".join(f"{name}={value}" for name, value in label.items())
        if late := self._late():
            log(f"{told}: skipped, {late}")
            self._report.add(self._section, {**label, "error": f"skipped: {late}"})
            return None
        self._tried += 1
        start = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # One setting that does not run must not lose the others.
            log(f"{told}: {one_line(error)}")
            self._report.add(self._section, {**label, "error": one_line(error)})
            return None
        row = {**label, **found, "row_seconds": round(time.monotonic() - start, 2)}
        self._report.add(self._section, row)
        log(f"{told}: {brief(found)}")
        return row


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def brief(found: Mapping[str, Any]) -> str:
    """The numbers of a row for a person; what is nested stays in the file."""
    shown = ((name, value) for name, value in found.items() if isinstance(value, int | float | str))
    return ", ".join(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown)


def facts(command: str, budget_s: float) -> dict[str, Any]:
    """Where and of what a run is."""
    device = jax.devices()[0]
    return {
        "command": command,
        "budget_s": budget_s,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "hardware": {
            **machine(os.cpu_count() or 1),
            "driver": driver(),
            "platform_version": str(getattr(device.client, "platform_version", "")),
            "peak_flops": devices.peak_flops(device),
            "peak_bytes_per_second": devices.peak_bandwidth(device),
            "memory_limit_bytes": devices.memory_limit(device),
        },
        "versions": versions(),
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this code, with -changed where files differ from it; None where there is no git."""
    root = Path(__file__).parent
    head = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    return head and head + ("-changed" if _output(["git", "-C", str(root), "status", "--porcelain"]) else "")


def driver() -> str | None:
    """Name, driver, memory and power limit of NVIDIA GPUs, as their driver tells."""
    query = "--query-gpu=name,driver_version,memory.total,power.limit"
    return _output(["nvidia-smi", query, "--format=csv,noheader"])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
