"""What one run on an accelerator measures."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jaxchat.experiment import Experiment
from jaxchat.sharding import Mesh

Family = Literal["july2026", "october2025"]


@dataclass(frozen=True)
class Bench:
    """Sizes, and how long it may take; tuples are written with commas.

    Attributes:
        budget_s: seconds after which nothing new begins; what still runs shortly after is cut off.
        only: the sections to measure, all of them where none is named.
        out: the file that is written anew after every row; bench_gpu.json or bench_tpu.json unless told otherwise.
        depths: models, by the recipe's dial.
        batch_tokens: tokens of an optimizer step.
        mesh: how several devices share a training step; fsdp splits the state, which a deep model needs.
        steps: measured steps of each setting, after two that warm up.
        tries: compilations that the search for a micro-batch may spend on each setting.
        kernel_rows: rows of the batch on which attention and loss are measured alone.
        repeats: measurements of each kernel; medians are told.
        loss_chunks: tokens of a chunk of the loss.
        batch_sizes: how many answers are decoded at once.
        prompt_tokens, decode_tokens: lengths of prompts and answers.
        rl_prompts, rl_samples, rl_tokens: problems of a rollout batch, answers to each, the longest answer.
        peers: whom training is set beside: "plain" is a GPT in torch alone, "transformers" its NanoChat.
        peer_rows: rows of a step beside a peer.
        peer_compile: whether peers run under torch.compile.
        cache: where compiled programs are kept, so that a second run gets further.
        anyway: measure on whatever JAX finds, also on a CPU.
    """

    budget_s: float = 540.0
    only: tuple[str, ...] = ()
    out: str = ""
    depths: tuple[int, ...] = (12, 20, 24)
    row_length: int = 2048
    vocab: Annotated[int, tyro.conf.arg(name="data.vocab")] = 32768
    head_dim: int = 128
    batch_tokens: int = 2**18
    mesh: Mesh = Mesh()
    steps: int = 10
    tries: int = 3
    kernel_rows: int = 16
    repeats: int = 10
    loss_chunks: tuple[int, ...] = (1024, 4096, 16384)
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256)
    prompt_tokens: int = 256
    decode_tokens: int = 128
    rl_prompts: int = 16
    rl_samples: int = 16
    rl_tokens: int = 256
    peers: tuple[Literal["plain", "transformers"], ...] = ("plain", "transformers")
    peer_rows: int = 16
    peer_compile: bool = True
    cache: str = "runs/cache/xla"
    anyway: bool = False

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name in ("budget_s", "only", "out", "mesh", "peers", "peer_compile", "cache", "anyway"):
            del sizes[name]
        for name, value in sizes.items():
            if not value if isinstance(value, tuple) else value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
            if isinstance(value, tuple) and min(value) < 1:
                raise ValueError(f"{name}={value} must all be at least 1")
        if not 0 <= self.budget_s < float("inf"):
            raise ValueError(f"budget_s={self.budget_s} must be a number of seconds")
        if self.batch_tokens % self.row_length:
            raise ValueError(f"batch_tokens={self.batch_tokens} is not a multiple of row_length={self.row_length}")

    @property
    def depth(self) -> int:
        """The model of the sections that measure one: d20, or the last that is named."""
        return 20 if 20 in self.depths else self.depths[-1]


DEFAULTS: Mapping[str, Bench] = {
    "gpu": Bench(),
    "tpu": Bench(batch_tokens=2**17, kernel_rows=8, peers=()),
}

Make = Callable[[int, Family, int], Experiment]
"""From depth, family and tokens of a step to the recipe's experiment of pretraining."""
