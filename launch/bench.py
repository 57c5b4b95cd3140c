"""Measures speed, beside a peer in one run: python -m launch.bench train --config=configs/d4.py --peer=transformers

The October 2025 family at the configuration's depth, with random weights and vocabulary 4,096 unless given; on a CPU in
float32. train: 8 rows of 512 tokens, AdamW on every parameter. decode: greedy answers to --prompt_tokens at each of
--batch_sizes, with and without the cache, a dispatch a token beside chunks, and speculation. rl: rollouts a second, all
in flight together, a prompt at a time and a sample at a time. evaluate: a checkpoint's questions and problems, all in
flight together and one at a time; python -m launch.bench evaluate --checkpoint=runs/d4/pretrain --tasks core:DIRECTORY
gpu, tpu: everything worth measuring there within --budget_s=540, the most valuable first, into --out=bench_gpu.json:
training, attention, loss, decoding, rollouts, torch beside it; python -m launch.bench gpu --only=train,decode
"""

import dataclasses
import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from configs import recipe
from jaxchat import command_line, launcher
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment

DEFAULTS = {
    "data.vocab": "4096",
    "data.row_length": "512",
    "data.train": "tinyworld:train",  # Not read: the benchmark trains on random ids.
    "batch_tokens": "4096",
    "micro_rows": "8",
    "steps": "1000",
}


def main(argv: list[str]) -> dict[str, object]:
    benchmarks = {"train": train, "decode": decode, "rl": rl, "evaluate": evaluate}
    benchmarks |= {kind: functools.partial(accelerator, kind) for kind in ("gpu", "tpu")}
    if argv and argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nOne of {', '.join(benchmarks)}; its options: python -m launch.bench train --help")
        raise SystemExit(0)
    if not argv or argv[0] not in benchmarks:
        raise UserError(
            f"which benchmark? name one of {', '.join(benchmarks)}: python -m launch.bench train --config=..."
        )
    return benchmarks[argv[0]](argv[1:])


def train(argv: list[str]) -> dict[str, object]:
    from jaxchat.benchmarks import train as benchmark

    bench, experiment = _read(benchmark.Bench, argv, {"dtype": "float32"})
    benchmark.level_field(experiment, bench.threads)
    return benchmark.run(experiment, bench)


def decode(argv: list[str]) -> dict[str, object]:
    from jaxchat.benchmarks import decode as benchmark
    from jaxchat.benchmarks.train import level_field

    bench, experiment = _read(benchmark.Bench, argv, {"dtype": "float32"} if "--peer=transformers" in argv else {})
    level_field(experiment, bench.threads, devices=1)
    return benchmark.run(experiment, bench)


def rl(argv: list[str]) -> dict[str, object]:
    from jaxchat.benchmarks import rl as benchmark
    from jaxchat.benchmarks.train import level_field

    bench, experiment = _read(benchmark.Bench, argv, {})
    level_field(experiment, bench.threads, devices=1)
    return benchmark.run(experiment, bench)


def evaluate(argv: list[str]) -> dict[str, object]:
    from jaxchat.benchmarks import evaluate as benchmark
    from jaxchat.benchmarks.train import few_cores

    bench = command_line.parse(benchmark.Bench, argv, description=__doc__)
    few_cores(bench.threads)
    return benchmark.run(bench, Experiment)


def accelerator(kind: str, argv: list[str]) -> dict[str, object]:
    from jaxchat.benchmarks.accelerator import options, running

    default = dataclasses.replace(options.DEFAULTS[kind], out=f"bench_{kind}.json")
    bench = command_line.parse(options.Bench, _spread(argv), default=default, description=__doc__)
    running.chosen(bench.only)
    # Before JAX looks for devices; the same threshold for every run, so that a second one finds what a first one made.
    jax.config.update("jax_compilation_cache_dir", str(Path(bench.cache).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    running.check_device(kind, anyway=bench.anyway)
    command = shlex.join(["python", "-m", "launch.bench", kind, *argv])
    return running.run(bench, functools.partial(_dialled, bench), command=command)


def _dialled(bench: Any, depth: int, family: Any, batch_tokens: int) -> Experiment:
    """The recipe's pretraining of a depth, with the benchmark's sizes."""
    dial = recipe.Dial(
        depth=depth,
        family=family,
        steps=1000,
        batch_tokens=batch_tokens,
        vocab=bench.vocab,
        row_length=bench.row_length,
        head_dim=bench.head_dim,
    )
    return dataclasses.replace(recipe.pretrain(dial, name="bench", train=("tinyworld:train",)), mesh=bench.mesh)


def _spread(argv: Sequence[str]) -> list[str]:
    """The arguments, what is written with commas as a list of its own words."""
    return [part for word in argv for part in (word.replace("=", ",", 1).split(",") if "," in word else [word])]


def _read(bench_class: type, argv: list[str], more: dict[str, str]) -> tuple[Any, Experiment]:
    """The benchmark's own options, and the experiment of the rest and the defaults."""
    from jaxchat import compilation

    own = {field.name for field in dataclasses.fields(bench_class)} | {"help"}
    name = lambda word: word.removeprefix("--").split("=")[0].replace("-", "_")  # noqa: E731
    mine = [word for word in argv if name(word) in own]
    bench = command_line.parse(bench_class, _spread(mine), description=__doc__)
    rest = [word for word in argv if word not in mine]
    given = {name(word) for word in rest}
    rest += [f"--{field}={value}" for field, value in (DEFAULTS | more).items() if field not in given]
    experiment = _october(command_line.load(rest))
    compilation.prepare_backend(experiment)
    return bench, experiment


def _october(experiment: Experiment) -> Experiment:
    """The experiment with the October 2025 model of its depth, head size, vocabulary and row length."""
    dial = recipe.Dial(
        depth=experiment.depth,
        family="october2025",
        vocab=experiment.data.vocab,
        row_length=experiment.data.row_length,
        head_dim=experiment.model.pattern[0].head_dim,
    )
    return dataclasses.replace(experiment, model=recipe.model(dial))


if __name__ == "__main__":
    launcher.run(main)
