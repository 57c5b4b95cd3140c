"""Decoding speed of the October 2025 family, beside the same model in transformers' generate, in one run.

Both sides answer the same prompts greedily, from the same weights, in alternating repeats. The share of the memory
roofline is the bytes that a step must read, over what a large copy reads in that time on this machine.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import devices
from jaxchat.benchmarks.cache import cache_curve, stored_prefixes
from jaxchat.benchmarks.engines import generate, make_engine, prompts, random_weights
from jaxchat.benchmarks.train import check_peer, machine, peer_config, state_dict, versions
from jaxchat.decode.sampling import SamplingParams
from jaxchat.decode.speculative import Speculation
from jaxchat.experiment import Experiment
from jaxchat.launcher import log
from jaxchat.model.transformer import Model, Transformer


@dataclass(frozen=True)
class Bench:
    """What to measure; every other option is a field of the Experiment.

    Attributes:
        peer: also generate with the same model in transformers.
        batch_sizes: how many requests at once.
        prompt_tokens: tokens of each prompt.
        decode_tokens: tokens of each answer.
        chunk: decoding steps a dispatch.
        temperature, top_k, top_p: how tokens are chosen; a peer compares greedy ones only.
        repeats: how often each side answers; medians are reported.
        threads: on a CPU, how many cores either side may use.
        lengths: answer lengths at which decoding with the cache is set beside decoding without it.
        speculative: also measure speculation, on text that repeats itself and on text that does not.
        token_dispatch: also decode with a dispatch a token.
        decoding: what attends to the cache, a row of `model.decoding_kernels.DECODING`, or "auto".
    """

    peer: Literal["none", "transformers"] = "none"
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    prompt_tokens: int = 64
    decode_tokens: int = 128
    chunk: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repeats: int = 5
    threads: int = 2
    lengths: tuple[int, ...] = (32, 64, 128, 256)
    speculative: bool = True
    token_dispatch: bool = True
    decoding: str = "auto"

    def __post_init__(self) -> None:
        counts = (self.prompt_tokens, self.decode_tokens, self.chunk, self.repeats, self.threads, *self.batch_sizes)
        if min(*counts, *self.lengths) < 1:
            raise ValueError("batch_sizes, prompt_tokens, decode_tokens, chunk, repeats and lengths must be at least 1")
        if self.peer != "none" and self.temperature:
            raise ValueError(f"--peer={self.peer} compares greedy tokens: leave --temperature=0")

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_k, self.top_p, ignore_end=True)


def run(experiment: Experiment, bench: Bench) -> dict[str, Any]:
    """Every measurement, by batch size, and what they share."""
    if bench.peer != "none":
        check_peer(experiment)
    config = experiment.model
    bandwidth = copy_bandwidth()
    log(f"a large copy moves {bandwidth / 1e9:.1f} GB/s")
    transformer = Transformer(config, jnp.dtype(_dtype(experiment)))
    weights = random_weights(transformer, experiment.seed)
    peer = None if bench.peer == "none" else Peer(config, weights, bench.threads)
    batches = [one_size(transformer, weights, bench, rows, bandwidth, peer) for rows in bench.batch_sizes]
    few = {"prompt_tokens": bench.prompt_tokens, "chunk": bench.chunk, "repeats": max(3, bench.repeats // 2)}
    cache = cache_curve(transformer, weights, bench.lengths, bench.sampling, **few)
    report: dict[str, Any] = {
        "tokens_per_second": batches[-1]["tokens_per_second"],
        "peer_tokens_per_second": batches[-1]["peer_tokens_per_second"],
        "ratio": batches[-1]["ratio"],
        "roofline_fraction": batches[-1]["roofline_fraction"],
        "batches": batches,
        "cache": cache,
        "prefixes": stored_prefixes(
            transformer,
            weights,
            prompt_tokens=bench.prompt_tokens,
            decode_tokens=bench.decode_tokens,
            chunk=bench.chunk,
            repeats=4 * bench.repeats,
        ),
        "copy_bytes_per_second": round(bandwidth),
        "peak_memory_bytes": devices.memory_bytes(),
        "prompt_tokens": bench.prompt_tokens,
        "decode_tokens": bench.decode_tokens,
        "chunk": bench.chunk,
        "sampling": {"temperature": bench.temperature, "top_k": bench.top_k, "top_p": bench.top_p},
        "model": {
            "depth": config.depth,
            "width": config.width,
            "vocab": config.vocab,
            "dtype": str(jnp.dtype(transformer.dtype)),
        },
        "versions": versions(("jax", "jaxlib", "flax", *(("torch", "transformers") if peer else ()))),
        "machine": machine(bench.threads),
    }
    if bench.speculative:
        report["speculation"] = speculation(transformer, weights, bench)
    return report


def _dtype(experiment: Experiment) -> str:
    if experiment.dtype != "auto":
        return experiment.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def one_size(
    transformer: Transformer, weights: Any, bench: Bench, rows: int, bandwidth: float, peer: Any
) -> dict[str, Any]:
    """Time to the first token, a token, and all of them, at one batch size."""
    vocab = transformer.config.vocab
    asked = prompts(vocab, rows, bench.prompt_tokens)
    params = dataclasses.replace(bench.sampling, max_tokens=bench.decode_tokens)
    length = bench.prompt_tokens + bench.decode_tokens
    kernel, shape = bench.decoding, {"length": length, "slots": rows}
    engine = make_engine(transformer, weights, decoding=kernel, steps=bench.chunk, **shape)
    start = time.perf_counter()
    answers = generate(engine, asked, params)
    first_seconds = time.perf_counter() - start
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: generate(engine, asked, params)}
    if bench.token_dispatch:
        single = make_engine(transformer, weights, decoding=kernel, steps=1, **shape)
        generate(single, asked, params)
        sides["dispatch"] = lambda: generate(single, asked, params)
    if peer is not None:
        theirs = peer.generate(asked, bench.decode_tokens)
        agree = float(np.mean([ours.tokens == tuple(other) for ours, other in zip(answers, theirs)]))
        sides["peer"] = lambda: peer.generate(asked, bench.decode_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    first_token, token_times = [], []
    for repeat in range(bench.repeats):
        for name in list(sides) if repeat % 2 else list(reversed(sides)):
            time.sleep(0.2)
            start = time.perf_counter()
            result = sides[name]()
            seconds[name].append(time.perf_counter() - start)
            if name == "ours":
                first_token.append(min(answer.first_token_seconds for answer in result))
                last = max(answer.first_token_seconds for answer in result)
                token_times.append((max(a.seconds for a in result) - last) / max(1, bench.decode_tokens - 1))
    speed = {name: rows * bench.decode_tokens / statistics.median(values) for name, values in seconds.items()}
    token_seconds = statistics.median(token_times)
    read = step_bytes(transformer, rows, bench.prompt_tokens + bench.decode_tokens // 2)
    log(f"batch {rows}: " + ", ".join(f"{name} {value:.0f} tokens/s" for name, value in speed.items()))
    return {
        "rows": rows,
        "tokens_per_second": round(speed["ours"], 1),
        "peer_tokens_per_second": round(speed["peer"], 1) if peer else None,
        "ratio": round(speed["ours"] / speed["peer"], 3) if peer else None,
        "answers_equal_to_peer": agree if peer else None,
        "first_token_seconds": round(statistics.median(first_token), 5),
        "token_seconds": round(token_seconds, 6),
        "decode_tokens_per_second": round(rows / token_seconds, 1),
        "token_dispatch_tokens_per_second": round(speed["dispatch"], 1) if bench.token_dispatch else None,
        "compile_seconds": round(first_seconds - statistics.median(seconds["ours"]), 2),
        "step_bytes": read,
        "roofline_fraction": round(read / token_seconds / bandwidth, 4),
    }


def step_bytes(transformer: Transformer, rows: int, length: int) -> int:
    """Bytes that one decoding step must read: every matrix once, and each row's keys and values so far."""
    config, size = transformer.config, jnp.dtype(transformer.dtype).itemsize
    shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(transformer.unstack, transformer.shapes()))
    tables = ("embed", "value_embedding")  # of these a row reads one line
    matrices = sum(leaf.size for path, leaf in shapes if path[-1].key not in tables or config.tied)
    keys = 0
    for i in range(config.depth):
        mixer = config.pattern[i % len(config.pattern)]
        seen = length if mixer.window is None else min(length, mixer.window + 1)
        keys += 2 * seen * mixer.kv_heads * mixer.head_dim
    return size * (matrices + rows * keys)


def copy_bandwidth() -> float:
    """Bytes a second of a copy much larger than any cache, read and written, the best of several."""
    size = 1 << (28 if jax.default_backend() == "cpu" else 30)
    source = jnp.zeros((size // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(source).block_until_ready()
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        copy(source).block_until_ready()
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


PERIOD = 32


def copying(weights: Any, config: Model) -> Any:
    """Weights of the same sizes whose greedy text counts from 0 to PERIOD - 1 again and again."""
    weights = jax.tree.map(np.array, weights)
    for layer in weights["layers"]:
        layer["mixer"]["o"] *= 0
        layer["mlp"]["out"] *= 0
    counted = np.arange(PERIOD)
    weights["ends"]["head"] = np.zeros_like(weights["ends"]["head"])
    weights["ends"]["head"][:, (counted + 1) % PERIOD] = weights["ends"]["embed"][counted].T
    return weights


def speculation(transformer: Transformer, weights: Any, bench: Bench) -> dict[str, Any]:
    """How much faster guessing is at batch 1 on text that repeats itself, and how much slower where nothing matches."""
    prompt = (np.arange(bench.prompt_tokens) % PERIOD).tolist()
    count = 4 * bench.decode_tokens
    length = bench.prompt_tokens + count
    plain = make_engine(transformer, weights, length=length, slots=1, steps=bench.chunk)
    guessing = make_engine(transformer, weights, length=length, slots=1, steps=bench.chunk, speculation=Speculation())
    told: dict[str, Any] = {}
    for name, temperature, own in (("copying", 0.0, copying(weights, transformer.config)), ("random", 1.0, weights)):
        plain.load(own)
        guessing.load(own)
        params = SamplingParams(temperature, max_tokens=count, ignore_end=True)
        seconds: dict[str, list[float]] = {"plain": [], "guessing": []}
        texts = {}
        for repeat in range(bench.repeats + 1):
            for side, engine in (("plain", plain), ("guessing", guessing)):
                start = time.perf_counter()
                texts[side] = generate(engine, [prompt], params)[0].tokens
                if repeat:
                    seconds[side].append(time.perf_counter() - start)
        ratio = statistics.median(seconds["plain"]) / statistics.median(seconds["guessing"])
        distinct = len(set(zip(*(texts["plain"][i:] for i in range(3))))) / max(1, count - 2)
        told[name] = {
            "ratio": round(ratio, 3),
            "equal": texts["plain"] == texts["guessing"],
            "distinct_trigrams": round(distinct, 3),
        }
        log(f"speculation on {name} text: {ratio:.2f} times as fast")
    return told


class Peer:
    """The same model in transformers."""

    def __init__(self, config: Model, weights: Any, threads: int) -> None:
        import torch
        from transformers import NanoChatForCausalLM

        torch.set_num_threads(threads)
        self._torch, self._device = torch, "cuda" if jax.default_backend() == "gpu" else "cpu"
        model = NanoChatForCausalLM(peer_config(config, length=4096, use_cache=True))
        model.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in state_dict(config, weights).items()})
        self._model = model.to(self._device).eval()  # type: ignore[arg-type]

    def generate(self, asked: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Greedy answers of `count` tokens to prompts of equal lengths."""
        torch = self._torch
        ids = torch.tensor([list(prompt) for prompt in asked], device=self._device)
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows
