"""A step of RL in its parts: sampling, scoring, training, as launch.train takes it, with weights that know nothing."""

import dataclasses
import statistics
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxchat import compilation, sharding
from jaxchat.benchmarks.accelerator import fitting
from jaxchat.benchmarks.accelerator.options import Bench, Make
from jaxchat.benchmarks.accelerator.report import Clock, Rows
from jaxchat.benchmarks.accelerator.training import start_state
from jaxchat.compilation import Setup
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.experiment import Experiment
from jaxchat.launcher import log
from jaxchat.rl.reinforcement import scorer
from jaxchat.rl.rollouts import RolloutStream
from jaxchat.rl.settings import RL
from jaxchat.tokenizer import SPECIALS

SLOTS = 256
STEPS = 3


class Bytes:
    """A tokenizer that needs no training: special tokens, then an id a byte; what is beyond has no text."""

    bos = 0

    def __init__(self) -> None:
        self.specials = {name: number for number, name in enumerate(SPECIALS)}
        assert self.specials["<|bos|>"] == self.bos

    def encode(self, text: str) -> list[int]:
        return [len(self.specials) + byte for byte in text.encode()]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        first = len(self.specials)
        return bytes(number - first for number in ids if first <= number < first + 256)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")


def rl(bench: Bench, make: Make, rows: Rows) -> None:
    """The smallest model that is asked for."""
    depth = min(bench.depths)

    def measured() -> dict[str, Any]:
        setup = compilation.make_setup(experiment(bench, make, depth), log)
        with jax.set_mesh(setup.mesh):
            return measure(setup, tries=bench.tries, clock=rows.clock)

    rows.attempt({"depth": depth, "prompts": bench.rl_prompts, "samples": bench.rl_samples}, measured)


def experiment(bench: Bench, make: Make, depth: int) -> Experiment:
    settings = RL(
        tasks=("arithmetic",),
        objective="reinforce",
        prompts=bench.rl_prompts,
        samples=bench.rl_samples,
        max_tokens=bench.rl_tokens,
        slots=min(SLOTS, bench.rl_prompts * bench.rl_samples),
    )
    e = make(depth, "july2026", bench.batch_tokens)
    return dataclasses.replace(e, stage="rl", start_from="sft", rl=settings)


def measure(setup: Setup, *, tries: int, clock: Clock) -> dict[str, Any]:
    """Seconds of the parts of a step, medians over a few after one that compiles; with random weights hardly any answer
    ends before its longest length.
    """
    e = setup.experiment
    assert e.rl is not None
    fitted = fitting.fit(setup, tries=tries)
    state = start_state(setup)
    shape = EngineConfig(length=e.data.row_length, slots=e.rl.slots, prefill_batch=min(8, e.rl.slots))
    engine = Engine(setup.transformer, state.params, Bytes(), shape)  # type: ignore[arg-type]
    stream = RolloutStream(
        e.rl, engine, scorer(setup), seed=0, row_length=e.data.row_length, micro_rows=fitted.rows, log=log
    )
    seconds: dict[str, list[float]] = {"sample": [], "score": [], "train": []}
    for index in range(1 + STEPS):
        if len(seconds["train"]) and clock.left() < sum(statistics.median(part) for part in seconds.values()):
            break
        columns, used = stream.batch(index, state.params)
        batch = sharding.put_batch(setup.mesh, columns) | {"count": jnp.int32(used)}
        jax.block_until_ready(batch)
        start = time.perf_counter()
        state, _ = fitted.step(state, batch)
        jax.block_until_ready(state)
        if index:
            seconds["train"].append(time.perf_counter() - start)
            seconds["sample"].append(stream.facts["sample_seconds"])
            seconds["score"].append(stream.facts["score_seconds"])
    parts = {f"{name}_seconds": round(statistics.median(values), 5) for name, values in seconds.items()}
    answers, whole = e.rl.prompts * e.rl.samples, sum(parts.values())
    return {
        **parts,
        "step_seconds": round(whole, 5),
        "answer_tokens": stream.facts["answer_tokens"],
        "sampled_tokens_per_second": round(answers * stream.facts["answer_tokens"] / parts["sample_seconds"], 1),
        "answers_per_second": round(answers / whole, 3),
        "gap_max": stream.facts["gap_max"],
        "micro_rows": fitted.rows,
        "micro_batches": used,
        "row_length": e.data.row_length,
        "slots": e.rl.slots,
        "compile_seconds": round(fitted.compiled.seconds, 2),
        "dtype": str(setup.transformer.dtype),
        "steps": len(seconds["train"]),
    }
