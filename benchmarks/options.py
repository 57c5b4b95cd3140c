"""The options of the benchmarks, and the experiment that the other arguments describe."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxchat import command_line
from jaxchat.experiment import Experiment

Section = Literal["train", "attention", "loss", "decode", "rl", "peer", "sweep"]


@dataclass(frozen=True)
class Bench:
    """Options of all benchmarks, by those that read them. Several values are written with commas."""

    threads: int = 2  # All but gpu and tpu: CPU cores that either side may use.
    repeats: int = 5  # All but train and evaluate: measurements of each side; medians are reported.
    peer: Literal["none", "transformers"] = "none"  # train, decode, gpu, tpu: also run the same model in transformers.
    blocks: int = 6  # train: alternating blocks of training steps per side.
    block_steps: int = 4  # train, gpu, tpu: measured steps per block.
    pause: float = 0.5  # train: seconds before a block, in which the threads of the other side go to sleep.
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)  # decode, gpu, tpu: answers decoded together.
    prompt_tokens: int = 64  # decode, rl, gpu, tpu: tokens of each prompt.
    decode_tokens: int = 128  # decode, rl, gpu, tpu: tokens of an answer, at most in RL.
    chunk: int = 16  # decode: decoding steps per dispatch.
    temperature: float = 0.0  # decode: 0 is greedy.
    top_k: int = 0  # decode: 0 keeps all tokens.
    top_p: float = 1.0  # decode: 1 keeps all tokens.
    lengths: tuple[int, ...] = (32, 64, 128, 256)  # decode: answer lengths with and without the cache.
    speculative: bool = True  # decode: also measure speculation.
    decoding: str = "auto"  # decode: what attends to the cache, a row of model.decoding_kernels.DECODING.
    prompts: int = 16  # rl, gpu, tpu: problems of a rollout batch.
    samples: int = 16  # rl, gpu, tpu: answers to each problem.
    slots: int = 64  # rl, evaluate, gpu, tpu: answers decoded at once.
    checkpoint: str = ""  # evaluate, serve: such as runs/d4/pretrain.
    quick: bool = False  # serve: few requests, once each, to see that everything runs.
    tasks: tuple[str, ...] = ()  # evaluate: as for launch.evaluate, except bits per byte.
    limit: int = 50  # evaluate: questions or problems of each task.
    max_tokens: int = 64  # evaluate: longest answer to a problem.
    budget_s: float = 540.0  # gpu, tpu: seconds after which nothing new begins; what runs is cut off shortly after.
    only: tuple[Section, ...] = ()  # gpu, tpu: the sections to measure; all of them if none is named.
    out: str = ""  # gpu, tpu: the file that is rewritten after every row.
    depths: tuple[int, ...] = (12, 20, 24)  # gpu, tpu: models, by the recipe's dial.
    rows: int = 16  # gpu, tpu: rows of a training step beside the peer, and of the batch for attention and loss.
    loss_chunks: tuple[int, ...] = (1024, 4096, 16384)  # gpu, tpu: tokens of a chunk of the loss.
    cache: str = "runs/cache/xla"  # gpu, tpu: where compiled programs are kept, so that a second run gets further.
    anyway: bool = False  # gpu, tpu: measure on whatever JAX finds, also on a CPU.

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = [size for size in (value if isinstance(value, tuple) else [value]) if type(size) is int]
            if min(numbers, default=1) < 1 and name != "top_k":
                raise ValueError(f"{name}={value} must be at least 1")
        if self.peer != "none" and self.temperature:
            raise ValueError(f"--peer={self.peer} compares greedy answers: leave --temperature=0")
        if not (self.pause >= 0 and 0 <= self.budget_s < float("inf") and self.depths and self.batch_sizes):
            raise ValueError("pause and budget_s must be finite and not negative, depths and batch_sizes not empty")

    @property
    def depth(self) -> int:
        """The model of the sections that measure one: d20, or the last that is named."""
        return 20 if 20 in self.depths else self.depths[-1]


LARGE: dict[str, Any] = {"block_steps": 10, "batch_sizes": (1, 4, 16, 64, 256), "prompt_tokens": 256, "slots": 256}
DEFAULTS: dict[str, dict[str, Any]] = {
    "rl": {"decode_tokens": 64, "repeats": 3},
    "gpu": LARGE | {"out": "bench_gpu.json", "peer": "transformers"},
    "tpu": LARGE | {"out": "bench_tpu.json", "rows": 8},
}


def read(kind: str, argv: Sequence[str], description: str) -> tuple[Bench, list[str]]:
    """The options of one kind of benchmark, and the arguments that are not among them."""
    words = [part for w in argv for part in (w.replace("=", ",", 1).split(",") if w.startswith("--") else [w])]
    bench, others = command_line.parse_known(
        Bench, words, default=Bench(**DEFAULTS.get(kind, {})), description=description
    )
    if kind not in ("gpu", "tpu") and hasattr(os, "sched_setaffinity"):  # Before JAX starts.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: bench.threads])
    return bench, others


def load(bench: Bench, arguments: Sequence[str]) -> Experiment:
    """The experiment that the arguments describe, with the October 2025 family and small sizes where they do not."""
    defaults = "--family=october2025 --data.vocab=4096 --data.row_length=512 --batch_tokens=4096 --steps=1000"
    dtype = ["--dtype=float32"] if bench.peer != "none" else []
    return command_line.load([*defaults.split(), *dtype, "--data.train=tinyworld:train", *arguments])
