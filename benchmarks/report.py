"""The report of a benchmark: where it ran, and a file that is whole after every row."""

import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxchat import devices, errors, launcher, machine, serialization
from jaxchat.data.cache import set_aside
from jaxchat.model import Model
from jaxchat.model.counts import parameter_counts

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader")


class Report:
    """A file of facts and rows, each an object of JSON, whole after every row; that of an earlier run is renamed."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path, self._lock, self._start = path, threading.Lock(), time.monotonic()
        self.content: dict[str, Any] = {**facts, "rows": []}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                launcher.log(f"{path} of an earlier run is kept as {set_aside(path)}")
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
    device, known = jax.devices()[0], machine.surroundings()
    about: dict[str, Any] = {name: known.pop(name) for name in ("processor", "cores")}
    about |= {"backend": device.platform, "device": device.device_kind, "devices": jax.device_count()}
    about |= {"driver": machine.output(*NVIDIA_SMI) or str(getattr(device.client, "platform_version", ""))}
    about |= {"memory_bytes": devices.memory_limit(device), "bytes_per_second": devices.peak_bandwidth(device)}
    flags = {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "LIBTPU_", "JAX_"))}
    facts = {"command": command, **known, "settings": serialization.to_json(bench)}
    return facts | {"machine": about, "flags": flags}


def facts_of(model: Model, dtype: Any) -> dict[str, Any]:
    """The columns of a row that describe its model, and the peak memory so far."""
    names = ("depth", "width", "vocab", "layer_loop", "remat", "isolate_documents")
    facts = {name: getattr(model, name) for name in names} | {"parameters": parameter_counts(model)["total"]}
    return facts | {"dtype": str(dtype), "peak_memory_bytes": devices.memory_bytes()}
