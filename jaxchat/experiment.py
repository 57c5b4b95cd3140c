"""The configuration of a run: one field per part, and the checks across parts."""

import dataclasses
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxchat import xla
from jaxchat.data.prepare import Data
from jaxchat.model.architecture import Model
from jaxchat.model.part import HUGE, TINY
from jaxchat.model.quantized import Matmul
from jaxchat.objectives.objective import Objective
from jaxchat.optimizer import Optimizer
from jaxchat.paths import check_local, split_step, user_path
from jaxchat.rl.settings import RL
from jaxchat.serialization import flags
from jaxchat.sharding import Mesh

PROMPTS = ("", "The", "One day")


class StageRow(NamedTuple):
    """A kind of run.

    `runner` is the class that runs it (module:name, see `stages.stage.Stage`); `chats`: the model is a chat model;
    `speedrun`: `launch.speedrun` runs it, and every configuration has it.
    """

    runner: str
    chats: bool
    speedrun: bool = True

    def load(self) -> Any:
        """Imports the runner."""
        module, _, name = self.runner.partition(":")
        return getattr(importlib.import_module(module), name)


# In the order in which `launch.speedrun` runs them.
STAGES: Mapping[str, StageRow] = {
    "pretrain": StageRow("jaxchat.stages.rows:FromText", chats=False),
    "sft": StageRow("jaxchat.stages.rows:FromConversations", chats=True),
    "rl": StageRow("jaxchat.rl.reinforcement:Reinforcement", chats=True),
}
SPEEDRUN = tuple(name for name, stage in STAGES.items() if stage.speedrun)

# Fields that may change when a run is resumed; a change of any other field makes another experiment.
RESUMABLE = (
    "steps",
    "directory",
    "name",
    "save_every",
    "eval_every",
    "eval_rows",
    "sample_every",
    "keep",
    "keep_params",
    "micro_rows",
    "attention",
    "xla",
    "prompts",
    "eval_problems",
    "tensorboard",
    "wandb",
    "mesh.",
    "data.workers",
    "data.cache",
    "model.layer_loop",
    "model.remat",
)

_COUNTS = ("save_every", "eval_every", "eval_rows", "sample_every", "keep_params")


@dataclass(frozen=True)
class Experiment:
    """One stage of one run. Lengths are in tokens, `*_every` in steps (0: only at the end).

    Attributes:
        depth: number of layers, from which the configuration derived the other sizes.
        steps: optimizer steps; 0 takes one pass over the rows (`data.epochs` sets how often each part is in it).
        batch_tokens: tokens per optimizer step, over all devices and hosts; in RL the number of samples decides.
        stage: a row of STAGES.
        directory: where runs and their cache are.
        name: directory of this run in `directory`.
        seed: of initial parameters, order of the rows, and samples in RL.
        start_from: checkpoint whose parameters training starts from: a stage of this run, or a checkpoint such as
            runs/other/pretrain@500; empty initializes them. Model and tokenizer are those of that checkpoint.
        warm_optimizer: also load the optimizer moments of that checkpoint.
        micro_rows: rows of one forward and backward pass, over all devices; "auto" takes the most that fit in memory.
        dtype: dtype of activations and matrix products; "auto" is bfloat16 if the accelerator supports it.
        attention: attention backend in training; "auto" is splash on TPUs and cudnn on GPUs if they support the model
            and agree with xla, otherwise xla.
        xla: names of compiler settings (jaxchat/xla.py); each applies to certain platforms only.
        matmul: Int8() or Float8() for the layers' large products in training, None for `dtype`; evaluation and
            decoding always compute in `dtype`.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations.
        sample_every: steps between samples.
        eval_rows: held-out rows scored at intervals, 0 for all; at the end all are scored, but never more than the run
            trains on.
        keep: number of checkpoints to keep.
        keep_params: number of snapshots of the parameters alone, evenly spread over the steps and kept to the end
            beside the checkpoints, to look at how the model learned; 0 makes none.
        prompts: texts that the model continues or answers at the end and every `sample_every` steps.
        tasks: tasks scored at every evaluation: arithmetic, gsm8k:DIRECTORY, core:DIRECTORY, my_task.py:Task, or any
            other task of launch.evaluate.
        eval_problems: problems or questions per task, the same at every evaluation.
        eval_tokens: length limit of an answer to a problem.
        eval_samples: answers per problem, sampled at temperature 1; pass@k is reported up to this k.
        tensorboard: also write metrics for TensorBoard (extra tensorboard).
        wandb: also send metrics to Weights & Biases (extra wandb).
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
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    xla: tuple[str, ...] = ("overlap",)
    matmul: Matmul = None
    save_every: int = 250
    eval_every: int = 250
    eval_rows: int = 256
    sample_every: int = 0
    keep: int = 2
    keep_params: int = 0
    prompts: tuple[str, ...] = field(default=PROMPTS)
    start_from: str = ""
    warm_optimizer: bool = False
    rl: RL | None = None
    tasks: tuple[str, ...] = ()
    eval_problems: int = 256
    eval_samples: int = 1
    eval_tokens: int = 256
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self) -> None:
        length = self.data.row_length
        least = 0 if self.rl is None else 1
        if not least <= self.steps < 2**31:
            raise ValueError(f"steps={self.steps} must lie between {least} and {2**31 - 1}")
        if self.stage not in STAGES:
            raise ValueError(f"stage={self.stage!r} must be one of {', '.join(STAGES)}")
        if self.rl is not None and self.matmul is not None:
            problem = f"matmul={self.matmul} would make log-probabilities in training differ from those of the sampler"
            raise ValueError(f"{problem}: leave it None in stage 'rl'")
        if self.warm_optimizer and not self.start_from:
            raise ValueError("warm_optimizer needs start_from, the checkpoint whose optimizer moments it loads")
        check_local("name", self.name)
        check_local("directory", self.directory)
        check_local("start_from", self.start_from)
        check_local("data.cache", self.data.cache)
        for name in ("eval_problems", "eval_samples", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must lie between 0 and {2**31 - 1}")
        if Path(self.name).parts[:1] in ((), ("cache",)) or self.run_directory == self.cache_directory:
            raise ValueError(f"name={self.name!r} is empty or the directory of the data cache: give another --name")
        if self.batch_tokens < length or self.batch_tokens % length:
            problem = f"batch_tokens={self.batch_tokens} is not a multiple of data.row_length={length}"
            raise ValueError(f"{problem}: set --batch_tokens={max(1, self.batch_tokens // length) * length}")
        if self.micro_rows != "auto" and (self.micro_rows < 1 or self.batch_rows % self.micro_rows):
            rows = max(
                n for n in range(1, self.batch_rows + 1) if not self.batch_rows % n and n <= max(1, self.micro_rows)
            )
            problem = f"micro_rows={self.micro_rows} does not divide the batch of {self.batch_rows} rows"
            raise ValueError(f"{problem}: set --micro_rows={rows}")
        for name in self.xla:
            if name not in xla.SETTINGS:
                raise ValueError(f"xla: unknown setting {name!r}; expected one of: {', '.join(xla.SETTINGS)}")
        if self.model.vocab != self.data.vocab:
            problem = f"model.vocab={self.model.vocab} is not data.vocab={self.data.vocab}"
            raise ValueError(f"{problem}: set --data.vocab only, from which model.vocab is derived")
        if (most := self.model.most_positions) is not None and length > most:
            problem = f"data.row_length={length} is more than the {most} positions that the model learns"
            raise ValueError(f"{problem}: set --data.row_length={most}, or more positions")
        for name, least in {**dict.fromkeys(_COUNTS, 0), "keep": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name, value in flags(self).items():
            numbers = [x for x in (value if isinstance(value, tuple) else [value]) if isinstance(x, float) and x]
            if not all(TINY <= abs(x) <= HUGE for x in numbers):
                raise ValueError(f"{name}={value} must be 0, or from {TINY:.2g} to {HUGE:.2g} in size, as in float32")

    def sizes_of(self, kind: Any, old: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields `given` for a part of another `kind` in place of `old`; a length that it needs is that of rows."""
        known = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
        return {**({"length": self.data.row_length} if "length" in known else {}), **given}

    @property
    def objective(self) -> Objective:
        """The loss that training minimises."""
        objective: Objective = STAGES[self.stage].load().objective(self)
        return objective

    @property
    def batch_rows(self) -> int:
        """Rows per optimizer step; in RL the maximum, with one sample per row."""
        return self.batch_tokens // self.data.row_length if self.rl is None else self.rl.update_samples

    def longer_rows(self, least: int) -> str:
        """The options that make rows of at least `least` tokens, and the batch a multiple of them."""
        length = 2 ** math.ceil(math.log2(least))
        rows = max(1, self.batch_tokens // length)
        wanted = {"data.row_length": length, "batch_tokens": rows * length}
        if self.micro_rows != "auto":
            wanted["micro_rows"] = math.gcd(self.micro_rows, rows)
        now = flags(self)
        return " ".join(f"--{name}={value}" for name, value in wanted.items() if now[name] != value)

    @property
    def run_directory(self) -> Path:
        return user_path(self.directory) / self.name

    @property
    def stage_directory(self) -> Path:
        return self.run_directory / self.stage

    @property
    def chats(self) -> bool:
        """Whether the model is a chat model; otherwise it continues texts."""
        return STAGES[self.stage].chats

    @property
    def start(self) -> str:
        """Path of the checkpoint that `start_from` names."""
        inside = split_step(self.start_from)[0] in STAGES
        return str(self.run_directory / self.start_from) if inside else self.start_from

    @property
    def cache_directory(self) -> Path:
        return user_path(self.data.cache or Path(self.directory) / "cache")
