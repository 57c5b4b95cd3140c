"""An experiment: everything that a run needs to know, one field per part, and the checks across parts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxchat.data.prepare import Data
from jaxchat.model.transformer import Model
from jaxchat.optim import Optimizer
from jaxchat.sharding import Mesh

PROMPTS = ("", "The", "One day")

# What may differ when a run is taken up again; any other difference is another experiment.
RESUMABLE = (
    "steps",
    "directory",
    "save_every",
    "eval_every",
    "eval_rows",
    "sample_every",
    "keep",
    "micro_rows",
    "prompts",
    "tensorboard",
    "wandb",
    "mesh.",
    "data.workers",
    "data.cache",
    "model.layer_loop",
    "model.remat",
)


@dataclass(frozen=True)
class Experiment:
    """One stage of one run. Lengths are in tokens, `*_every` in steps (0: only at the end).

    Attributes:
        depth: the dial that the other sizes were derived from.
        batch_tokens: tokens of one optimizer step, over all devices and hosts.
        micro_rows: rows of one forward and backward pass, over all devices; "auto" takes the most that fit in memory.
        dtype: type of activations and matrix products; "auto" is bfloat16 where the accelerator has it.
        eval_rows: held-out rows scored at intervals, 0 for all; at the end all are scored, but never more than the run
            trains on.
        keep: how many checkpoints are kept.
    """

    model: Model
    optimizer: Optimizer
    data: Data
    depth: int
    steps: int
    batch_tokens: int
    stage: str = "pretrain"
    directory: str = "runs"
    name: str = "run"
    seed: int = 0
    micro_rows: int | Literal["auto"] = "auto"
    mesh: Mesh = Mesh()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    save_every: int = 250
    eval_every: int = 250
    eval_rows: int = 256
    sample_every: int = 0
    keep: int = 2
    prompts: tuple[str, ...] = field(default=PROMPTS)
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        length = self.data.row_length
        if not 1 <= self.steps < 2**31:
            raise ValueError(f"steps={self.steps} must lie between 1 and {2**31 - 1}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must lie between 0 and {2**31 - 1}")
        if Path(self.name).parts[:1] in ((), ("cache",)) or self.run_directory == self.cache_directory:
            raise ValueError(f"name={self.name!r} is where prepared data are cached, or nothing: give another --name")
        if self.batch_tokens < length or self.batch_tokens % length:
            raise ValueError(f"batch_tokens={self.batch_tokens} is not a multiple of data.row_length={length}")
        if self.micro_rows != "auto" and (self.micro_rows < 1 or self.batch_rows % self.micro_rows):
            raise ValueError(f"micro_rows={self.micro_rows} does not divide the batch of {self.batch_rows} rows")
        if self.model.vocab != self.data.vocab:
            told = f"model.vocab={self.model.vocab} is not data.vocab={self.data.vocab}"
            raise ValueError(f"{told}: set --data.vocab, the model follows")
        if min(self.save_every, self.eval_every, self.eval_rows, self.sample_every) < 0 or self.keep < 1:
            raise ValueError("save_every, eval_every, eval_rows and sample_every must not be negative, keep at least 1")

    @property
    def batch_rows(self) -> int:
        return self.batch_tokens // self.data.row_length

    @property
    def run_directory(self) -> Path:
        return Path(self.directory) / self.name

    @property
    def stage_directory(self) -> Path:
        return self.run_directory / self.stage

    @property
    def cache_directory(self) -> Path:
        return Path(self.data.cache or Path(self.directory) / "cache")
