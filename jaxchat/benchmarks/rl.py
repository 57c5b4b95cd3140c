"""Speed of rollouts: many prompts with many samples at once, beside one prompt and beside one sample at a time.

All three ask the same engine code with the same weights, each in a shape of its own, compiled and warm, in alternating
repeats. Answers differ in length, as those of a model do: every token ends its answer with probability
2 / `decode_tokens`. One at a time, the first samples of the same prompts are drawn.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxchat import devices
from jaxchat.benchmarks.engines import Ids, prompts, random_weights
from jaxchat.benchmarks.train import machine, versions
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Completion, Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.experiment import Experiment
from jaxchat.launcher import log
from jaxchat.model.transformer import Transformer


@dataclass(frozen=True)
class Bench:
    """What to measure; every other option is a field of the Experiment.

    Attributes:
        prompts: problems of a rollout batch.
        samples: answers to each.
        prompt_tokens: tokens of each prompt.
        decode_tokens: tokens of the longest answer.
        chunk: decoding steps a dispatch.
        slots: answers decoded at once, where all are in flight together.
        repeats: how often each way is timed; medians are reported.
        threads: on a CPU, how many cores may be used.
        single: how many answers are timed one at a time.
    """

    prompts: int = 16
    samples: int = 16
    prompt_tokens: int = 64
    decode_tokens: int = 64
    chunk: int = 8
    slots: int = 64
    repeats: int = 3
    threads: int = 2
    single: int = 16

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "prompt_tokens", "decode_tokens", "chunk", "slots", "repeats", "single"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def run(experiment: Experiment, bench: Bench) -> dict[str, Any]:
    """Rollouts a second in each of the three ways."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    transformer = Transformer(experiment.model, jnp.dtype(dtype if experiment.dtype == "auto" else experiment.dtype))
    weights = random_weights(transformer, experiment.seed)
    asked = requests(experiment.model.vocab, bench)
    alone = [dataclasses.replace(asked[i % bench.prompts], n=1) for i in range(bench.single)]
    length = bench.prompt_tokens + bench.decode_tokens

    def engine(slots: int) -> Engine:
        shape = EngineConfig(length=length, slots=slots, steps=bench.chunk, prefill_batch=min(8, slots))
        return Engine(transformer, weights, Ids(), shape)  # type: ignore[arg-type]

    together, by_prompt, by_sample = engine(bench.slots), engine(bench.samples), engine(1)
    ways: dict[str, Callable[[], list[list[Completion]]]] = {
        "together": lambda: together.generate(asked),
        "a_prompt_at_a_time": lambda: [by_prompt.generate([request])[0] for request in asked],
        "a_sample_at_a_time": lambda: [by_sample.generate([request])[0] for request in alone],
    }
    answers = {name: way() for name, way in ways.items()}  # Compiles; later repeats are warm.
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(bench.repeats):
        for name in list(ways) if repeat % 2 else reversed(list(ways)):
            time.sleep(0.2)
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    speed = {name: sum(map(len, answers[name])) / statistics.median(seconds[name]) for name in ways}
    lengths = [len(answer.tokens) for group in answers["together"] for answer in group]
    log(", ".join(f"{name} {value:.1f} rollouts/s" for name, value in speed.items()))
    return {
        "rollouts_per_second": round(speed["together"], 2),
        "ratio_to_a_prompt_at_a_time": round(speed["together"] / speed["a_prompt_at_a_time"], 3),
        "ratio_to_a_sample_at_a_time": round(speed["together"] / speed["a_sample_at_a_time"], 3),
        "a_prompt_at_a_time": round(speed["a_prompt_at_a_time"], 2),
        "a_sample_at_a_time": round(speed["a_sample_at_a_time"], 2),
        "tokens_per_second": round(speed["together"] * statistics.mean(lengths), 1),
        "answer_tokens": round(statistics.mean(lengths), 1),
        "settings": dataclasses.asdict(bench),
        "peak_memory_bytes": devices.memory_bytes(),
        "model": {"depth": experiment.depth, "width": experiment.model.width, "vocab": experiment.model.vocab},
        "versions": versions(("jax", "jaxlib", "flax")),
        "machine": machine(bench.threads),
    }


def requests(vocab: int, bench: Bench) -> list[Request]:
    """One request a prompt, for all its samples; a share of the vocabulary ends an answer."""
    ends = tuple(range(1, 1 + max(1, 2 * vocab // bench.decode_tokens)))
    return [
        Request(
            prompt, SamplingParams(1.0, max_tokens=bench.decode_tokens, stop_tokens=ends, seed=seed), n=bench.samples
        )
        for seed, prompt in enumerate(prompts(vocab, bench.prompts, bench.prompt_tokens))
    ]
