"""An experiment: everything that a run needs to know, one field per part, and the checks across parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from jaxchat import xla
from jaxchat.data.prepare import Data
from jaxchat.errors import check_local
from jaxchat.model.quantized import Matmul
from jaxchat.model.transformer import Model
from jaxchat.objectives.likelihood import Likelihood
from jaxchat.objectives.objective import Objective
from jaxchat.objectives.policy import PolicyGradient
from jaxchat.optimizer import Optimizer
from jaxchat.rl.settings import RL
from jaxchat.sharding import Mesh

PROMPTS = ("", "The", "One day")


class Stage(NamedTuple):
    """A kind of run: what it is, the class that runs it (module:name), and whether its model holds conversations."""

    about: str
    runner: str
    chats: bool


# In the order in which `launch.speedrun` runs them.
STAGES: Mapping[str, Stage] = {
    "pretrain": Stage("learns from documents", "jaxchat.stages.rows:FromText", chats=False),
    "sft": Stage("learns from conversations", "jaxchat.stages.rows:FromConversations", chats=True),
    "rl": Stage("learns from rewards", "jaxchat.rl.reinforcement:Reinforcement", chats=True),
}

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


@dataclass(frozen=True)
class Experiment:
    """One stage of one run. Lengths are in tokens, `*_every` in steps (0: only at the end).

    Attributes:
        depth: the dial that the other sizes were derived from.
        steps: optimizer steps; 0 takes the rows once (`data.epochs` says how often each part of them).
        batch_tokens: tokens of one optimizer step, over all devices and hosts; RL takes as many as its samples need.
        stage: a row of STAGES.
        start_from: whose parameters training starts from: a stage of this run, or a checkpoint such as
            runs/other/pretrain@500; empty for fresh ones. Model and tokenizer are those of that checkpoint.
        warm_optimizer: start with that checkpoint's optimizer moments as well.
        micro_rows: rows of one forward and backward pass, over all devices; "auto" takes the most that fit in memory.
        dtype: type of activations and matrix products; "auto" is bfloat16 where the accelerator has it.
        attention: what computes attention in training; "auto" is splash on TPUs and cudnn on GPUs where they can serve
            the model and give what xla gives, otherwise xla.
        xla: rows of jaxchat/xla.py's table of compiler settings; each knows which platforms it is for.
        matmul: Int8() or Float8() for the layers' large products in training, None for `dtype`; whatever reads the
            parameters afterwards, evaluations too, computes in `dtype`.
        eval_rows: held-out rows scored at intervals, 0 for all; at the end all are scored, but never more than the run
            trains on.
        keep: how many checkpoints are kept.
        tasks: problems and questions that the model is scored on with every evaluation: arithmetic, gsm8k:DIRECTORY,
            core:DIRECTORY, my_task.py:Task; any that launch.evaluate knows.
        eval_problems: how many problems or questions of each task, the same at every evaluation.
        eval_tokens: longest answer to one of them.
        eval_samples: answers to each problem, drawn at temperature 1; pass@k is told up to this k.
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
            problem = f"matmul={self.matmul} would give RL other log-probabilities than those of its samples"
            raise ValueError(f"{problem}: leave it None in stage 'rl'")
        if self.warm_optimizer and not self.start_from:
            raise ValueError("warm_optimizer needs start_from: there is no optimizer to go on with")
        check_local("directory", self.directory)
        check_local("start_from", self.start_from)
        check_local("data.cache", self.data.cache)
        for name in ("eval_problems", "eval_samples", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must lie between 0 and {2**31 - 1}")
        if Path(self.name).parts[:1] in ((), ("cache",)) or self.run_directory == self.cache_directory:
            raise ValueError(f"name={self.name!r} is where prepared data are cached, or nothing: give another --name")
        if self.batch_tokens < length or self.batch_tokens % length:
            raise ValueError(f"batch_tokens={self.batch_tokens} is not a multiple of data.row_length={length}")
        if self.micro_rows != "auto" and (self.micro_rows < 1 or self.batch_rows % self.micro_rows):
            raise ValueError(f"micro_rows={self.micro_rows} does not divide the batch of {self.batch_rows} rows")
        for name in self.xla:
            if name not in xla.SETTINGS:
                raise ValueError(f"xla names {name!r}: there are {', '.join(xla.SETTINGS)}")
        if self.model.vocab != self.data.vocab:
            problem = f"model.vocab={self.model.vocab} is not data.vocab={self.data.vocab}"
            raise ValueError(f"{problem}: set --data.vocab, the model follows")
        if min(self.save_every, self.eval_every, self.eval_rows, self.sample_every) < 0 or self.keep < 1:
            raise ValueError("save_every, eval_every, eval_rows and sample_every must not be negative, keep at least 1")

    @property
    def objective(self) -> Objective:
        """What training minimises."""
        if self.rl is None:
            return Likelihood()
        return PolicyGradient(self.rl.policy, self.rl.temperature, self.rl.truncates)

    @property
    def batch_rows(self) -> int:
        """Rows of one optimizer step; in RL at most, one sample a row."""
        return self.batch_tokens // self.data.row_length if self.rl is None else self.rl.update_samples

    @property
    def run_directory(self) -> Path:
        return Path(self.directory) / self.name

    @property
    def stage_directory(self) -> Path:
        return self.run_directory / self.stage

    @property
    def chats(self) -> bool:
        """Whether the model holds conversations; otherwise it continues texts."""
        return STAGES[self.stage].chats

    @property
    def start(self) -> str:
        """The checkpoint that `start_from` means."""
        inside = self.start_from.partition("@")[0] in STAGES
        return str(self.run_directory / self.start_from) if inside else self.start_from

    @property
    def cache_directory(self) -> Path:
        return Path(self.data.cache or Path(self.directory) / "cache")
