"""Writers of metrics: JSON lines, terminal, TensorBoard, Weights & Biases."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.console import Console

from jaxchat.data.cache import write_text
from jaxchat.serialization import json_line


class Writer(Protocol):
    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends to metrics.jsonl, one object per line, after removing the lines of steps after `resumed_step`.

    If the evaluation of `resumed_step` is repeated (perhaps on other devices, with other rounding), the old line stays.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        earlier = [line for line in lines if _step_of(line) <= resumed_step]
        self._present = {_kind(json.loads(line)) for line in earlier if _step_of(line) == resumed_step}
        write_text(path, "".join(line + "\n" for line in earlier))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        if _kind(record) not in self._present:
            self._file.write(json_line(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _kind(record: dict[str, Any]) -> tuple[int, frozenset[str]]:
    """A record's step and the names of its values."""
    return record["step"], frozenset(record)


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line without one, for example because a crash truncated it."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


PRINT_SECONDS = 5.0  # Between two training steps that are printed.


class Terminal:
    """Prints to process 0's standard error: a training step every few seconds, and every evaluation."""

    def __init__(self, steps: int) -> None:
        # Without emoji=False, rich renders `:train:` in tinyworld:train:100 as an emoji.
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self.steps, self._last = steps, 0.0

    def log(self, text: str) -> None:
        if jax.process_index() == 0:
            self._console.print(text, markup=False)

    def write(self, record: dict[str, Any]) -> None:
        now, step = time.monotonic(), record["step"]
        if "loss" in record:
            if now - self._last < PRINT_SECONDS and step != self.steps:
                return
            self._last = now
            left = (self.steps - step) * record["seconds"]
            skipped = f"  skipped {record['skipped']}" if record["skipped"] else ""
            self.log(
                f"step {step:>6,}/{self.steps:,}  loss {record['loss']:.4f}  grad norm {record['grad_norm']:.3f}  "
                f"{_progress(record)}{skipped}  {_clock(left)} left"
            )
        else:
            values = "  ".join(f"{name} {value:.4f}" for name, value in record.items() if isinstance(value, float))
            self.log(f"step {step:>6,}/{self.steps:,}  {values}")

    def close(self) -> None:
        sys.stderr.flush()


def _progress(record: dict[str, Any]) -> str:
    """The numbers of a training step besides its loss: throughput, or in RL the rewards of its answers."""
    if "tokens_per_second" in record:
        mfu = "" if record["mfu"] is None else f"  mfu {record['mfu']:.1%}"
        return f"{record['tokens_per_second']:,.0f} tokens/s{mfu}"
    times = "+".join(f"{record[f'{part}_seconds']:.1f}" for part in ("sample", "score", "train"))
    correct = f"correct {record['reward_correct']:.3f}  " if "reward_correct" in record else ""
    failed = f"{record['reward_errors']} not rewarded  " if record["reward_errors"] else ""
    return (
        f"reward {record['reward']:.3f}  {correct}{failed}{record['answer_tokens']:.0f} tokens per answer  "
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
