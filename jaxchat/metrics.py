"""Numbers of a run: peak FLOPs, and the writers of metrics."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxchat.config import json_line

# Dense bfloat16 FLOPs a second of one device, from the vendors' data sheets; a prefix of jax's device_kind.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}

# Bytes a second of one device's memory: Google Cloud's TPU pages, NVIDIA's data sheets; a prefix of jax's device_kind.
PEAK_BANDWIDTH = {
    "TPU v4": 1.2e12,
    "TPU v5 lite": 0.819e12,
    "TPU v5e": 0.819e12,
    "TPU v5p": 2.765e12,
    "TPU v5": 2.765e12,
    "TPU v6 lite": 1.64e12,
    "TPU v6e": 1.64e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 80GB HBM3": 3.352e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA B200": 7.672e12,
    "NVIDIA L4": 0.3e12,
    "NVIDIA GeForce RTX 4090": 1.008e12,
}


def peak_flops(device: Any) -> float | None:
    """Peak FLOPs a second of one device: from the table, None where the kind is unknown, measured on a CPU."""
    if device.platform == "cpu":
        return _measured_peak() / jax.local_device_count()
    return _of_kind(PEAK_FLOPS, device)


def peak_bandwidth(device: Any) -> float | None:
    """Peak bytes a second of one device's memory, read or written; None where the kind is unknown, and on a CPU."""
    return _of_kind(PEAK_BANDWIDTH, device)


def capability(device: Any) -> float | None:
    """An NVIDIA GPU's compute capability, such as 9.0; None of other devices, whose names for it are no numbers."""
    try:
        return float(device.compute_capability)
    except (AttributeError, TypeError, ValueError):
        return None


def _of_kind(table: Mapping[str, float], device: Any) -> float | None:
    """The entry whose name is the longest beginning of the device's kind."""
    known = [kind for kind in table if device.device_kind.startswith(kind)]
    return table[max(known, key=len)] if known else None


def _measured_peak(size: int = 1024, repeats: int = 4) -> float:
    """Float32 FLOPs a second of the whole CPU: the best of a few square products, one on each device at once."""
    devices = jax.local_devices()
    xs = [jax.device_put(jnp.ones((size, size), jnp.float32), d) for d in devices]
    product = jax.jit(jnp.matmul)
    best = math.inf
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready([product(x, x) for x in xs])
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 * len(devices) / best


def memory_bytes() -> int:
    """Peak memory so far: of one device where it tells, otherwise of this process."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats:
        return int(stats.get("peak_bytes_in_use", 0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_limit(device: Any) -> int:
    """Bytes that one device may use."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


class Writer(Protocol):
    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object a line. Lines after `resumed_step` are cut off first.

    The evaluation of that step may come again, on other devices with other roundings: what is there already is kept.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= resumed_step]
        self._there = {_kind(json.loads(line)) for line in kept if _step_of(line) == resumed_step}
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        if _kind(record) not in self._there:
            self._file.write(json_line(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _kind(record: dict[str, Any]) -> tuple[int, frozenset[str]]:
    """A record's step, and what it tells of."""
    return record["step"], frozenset(record)


def _step_of(line: str) -> float:
    """The step of a line; a line that a crash cut short counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Terminal:
    """Lines for a person, on the first process's standard error: a step every few seconds, every evaluation."""

    def __init__(self, steps: int, every_seconds: float = 5.0) -> None:
        # Without emoji=False, rich makes a railway carriage of the middle of tinyworld:train:100.
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self.steps, self._every, self._last = steps, every_seconds, 0.0

    def say(self, text: str) -> None:
        if jax.process_index() == 0:
            self._console.print(text, markup=False)

    def write(self, record: dict[str, Any]) -> None:
        now, step = time.monotonic(), record["step"]
        if "loss" in record:
            if now - self._last < self._every and step != self.steps:
                return
            self._last = now
            left = (self.steps - step) * record["seconds"]
            skipped = f"  skipped {record['skipped']}" if record["skipped"] else ""
            self.say(
                f"step {step:>6,}/{self.steps:,}  loss {record['loss']:.4f}  grad norm {record['grad_norm']:.3f}  "
                f"{_told(record)}{skipped}  {_clock(left)} left"
            )
        else:
            told = "  ".join(f"{name} {value:.4f}" for name, value in record.items() if isinstance(value, float))
            self.say(f"step {step:>6,}/{self.steps:,}  {told}")

    def close(self) -> None:
        sys.stderr.flush()


def _told(record: dict[str, Any]) -> str:
    """What a training step tells beside its loss: its speed, or what its answers were worth."""
    if "tokens_per_second" in record:
        mfu = "" if record["mfu"] is None else f"  mfu {record['mfu']:.1%}"
        return f"{record['tokens_per_second']:,.0f} tokens/s{mfu}"
    times = "+".join(f"{record[f'{part}_seconds']:.1f}" for part in ("sample", "score", "train"))
    correct = f"correct {record['reward_correct']:.3f}  " if "reward_correct" in record else ""
    failed = f"{record['reward_errors']} not rewarded  " if record["reward_errors"] else ""
    return (
        f"reward {record['reward']:.3f}  {correct}{failed}{record['answer_tokens']:.0f} tokens an answer  "
        f"entropy {record['entropy']:.2f}  gap {record['gap_max']:.1e}  {times} s"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class TensorBoard:
    """Scalars for TensorBoard (extra `tensorboard`)."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.summary import Writer as SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, float(value), int(record["step"]))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Scalars for wandb (extra `wandb`)."""

    def __init__(self, name: str, config: Any) -> None:
        import wandb

        self._run = wandb.init(project="jaxchat", name=name, config=config, resume="allow", id=name.replace("/", "-"))

    def write(self, record: dict[str, Any]) -> None:
        self._run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def close(self) -> None:
        self._run.finish()
