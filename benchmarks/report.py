"""The report of a benchmark: where it ran, and a file that is whole after every row."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxchat import devices, errors, launcher, serialization
from jaxchat.model import Model
from jaxchat.model.counts import parameter_counts

PACKAGES = "jax jaxlib flax optax numpy libtpu jax-cuda12-plugin jax-cuda13-plugin torch transformers"
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader")


class Report:
    """A file of facts and rows, each an object of JSON, whole after every row; that of an earlier run is renamed."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path, self._lock, self._start = path, threading.Lock(), time.monotonic()
        self.content: dict[str, Any] = {**facts, "rows": []}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
                kept = path.rename(next(name for name in names if not name.exists()))
                launcher.log(f"{path} of an earlier run is kept as {kept}")
            self._write()
        except OSError as error:
            raise errors.UserError(
                f"{path} cannot be written ({errors.first_line(error)}): name another --out"
            ) from None

    def add(self, row: Mapping[str, Any]) -> None:
        with self._lock:
            self.content["rows"].append(rounded(row))
            self._write()
        launcher.log(serialization.json_line(rounded(row)))

    def _write(self) -> None:
        """Writes the whole file beside the old one, then replaces that."""
        self.content["seconds"] = round(time.monotonic() - self._start, 2)
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(serialization.json_line(self.content) + "\n", encoding="utf-8")
        temporary.replace(self._path)

    def measured(self) -> bool:
        """Whether a row has numbers."""
        return any("error" not in row for row in self.content["rows"])


def rounded(content: Any) -> Any:
    """The content as JSON has it, every float rounded to seven significant digits, about those of float32."""
    return json.loads(serialization.json_line(content), parse_float=lambda text: float(f"{float(text):.7g}"))


def surroundings(bench: Any, command: str = "") -> dict[str, Any]:
    """What a result depends on: options, code, versions, machine, accelerator, driver, and the data sheet's peak."""
    cpuinfo, device, versions = Path("/proc/cpuinfo"), jax.devices()[0], {"python": platform.python_version()}
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    for name in PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    git = ("git", "-C", str(Path(__file__).parent))
    commit, changed = output(*git, "rev-parse", "HEAD"), output(*git, "status", "--porcelain")
    machine: dict[str, Any] = {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count()}
    machine |= {"backend": device.platform, "device": device.device_kind, "devices": jax.device_count()}
    machine |= {"driver": output(*NVIDIA_SMI) or str(getattr(device.client, "platform_version", ""))}
    machine |= {"memory_bytes": devices.memory_limit(device), "bytes_per_second": devices.peak_bandwidth(device)}
    flags = {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "LIBTPU_", "JAX_"))}
    facts = {"command": command, "commit": commit and commit + "-changed" * bool(changed), "versions": versions}
    return facts | {"settings": serialization.to_json(bench), "machine": machine, "flags": flags}


def output(*command: str) -> str | None:
    """What a command prints; None if it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def facts_of(model: Model, dtype: Any) -> dict[str, Any]:
    """What a row says of its model and of the memory so far."""
    names = ("depth", "width", "vocab", "layer_loop", "remat", "isolate_documents")
    facts = {name: getattr(model, name) for name in names} | {"parameters": parameter_counts(model)["total"]}
    return facts | {"dtype": str(dtype), "peak_memory_bytes": devices.memory_bytes()}
