"""Decoding speed of the engine, beside transformers' generate with the same weights and prompts, greedily, in turn.

The fraction of the memory roofline is the bytes that a step must read, over what a large copy moves in that time.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import options, peer, report, timing
from jaxchat import devices, launcher
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams, choose, pack
from jaxchat.decode.speculative import Speculation
from jaxchat.experiment import Experiment
from jaxchat.model.counts import parameter_counts
from jaxchat.model.transformer import Transformer
from jaxchat.tokenizer.chat_format import NANOCHAT

FEW, MANY = 64, 256  # Stored prefixes.
# Random ids have no text.
TOKENIZER: Any = SimpleNamespace(
    bos=0,
    ends={0},
    specials=dict.fromkeys(NANOCHAT.specials, -1),
    chat_format=NANOCHAT,
    decode_bytes=lambda ids: b"",
)


def random_prompts(vocab: int, rows: int, tokens: int) -> list[list[int]]:
    return np.random.default_rng(rows).integers(1, vocab, (rows, tokens)).tolist()


def random_model(e: Experiment) -> tuple[Transformer, Any]:
    """The model, with weights of ordinary size everywhere; fresh ones have zeros, which make all tokens alike."""
    transformer = Transformer(e.model, devices.compute_dtype(e.dtype, jax.devices()[0], launcher.log))
    leaves, tree = jax.tree.flatten(transformer.shapes())
    scale = lambda shape: 1.0 if len(shape) < 2 else max(shape[-2:]) ** -0.5  # noqa: E731
    draw = lambda i, shape: scale(shape) * jax.random.normal(jax.random.key(e.seed + i), shape)  # noqa: E731
    drawn = jax.jit(lambda: [draw(i, leaf.shape) for i, leaf in enumerate(leaves)])()
    return transformer, jax.tree.unflatten(tree, drawn)


def run(bench: options.Bench, arguments: list[str]) -> dict[str, Any]:
    """Every measurement of decoding, on one device."""
    transformer, weights = model = random_model(options.load(bench, arguments))
    make_peer = partial(peer.Peer, transformer.config, weights, dtype=transformer.dtype, threads=bench.threads)
    torch = None if bench.peer == "none" else make_peer()
    copied, columns = copy_bandwidth(), ("tokens_per_second", "peer_tokens_per_second", "ratio", "roofline_fraction")
    batches = [measure(*model, bench, rows, copied, torch) for rows in bench.batch_sizes]
    return {
        **{name: batches[-1][name] for name in columns},
        "batches": batches,
        "cache": [cache_gain(*model, bench, count) for count in bench.lengths],
        "prefixes": stored_prefixes(*model, bench),
        "speculation": speculation(*model, bench) if bench.speculative else None,
        **report.surroundings(bench),
    }


def make_engine(transformer: Any, weights: Any, bench: options.Bench, guesses: Any = None, **shape: int) -> Engine:
    fixed = EngineConfig(**shape, steps=bench.chunk, adapt=False)
    return Engine(transformer, weights, TOKENIZER, fixed, speculation=guesses, decoding=bench.decoding)


def generate(engine: Engine, asked: Sequence[Sequence[int]], params: SamplingParams) -> list[Any]:
    return [answer for (answer,) in engine.generate([Request(prompt, params) for prompt in asked])]


def measure(
    transformer: Transformer, weights: Any, bench: options.Bench, rows: int, copied: float, torch: Any = None
) -> dict[str, Any]:
    """Tokens per second, time to the first token, and the memory roofline at one batch size."""
    count, asked = bench.decode_tokens, random_prompts(transformer.config.vocab, rows, bench.prompt_tokens)
    engine = make_engine(transformer, weights, bench, length=bench.prompt_tokens + count, slots=rows)
    params = SamplingParams(bench.temperature, top_k=bench.top_k, top_p=bench.top_p, max_tokens=count, ignore_end=True)
    sides: dict[str, Callable[[], Any]] = {"ours": partial(generate, engine, asked, params)}
    answers, first_seconds = timing.timed(sides["ours"])
    sides |= {"peer": partial(torch.generate, asked, count)} if torch else {}
    equal = torch and statistics.mean(mine.tokens == other for mine, other in zip(answers, sides["peer"]()))
    seconds, found = timing.alternate(sides, bench.repeats, 0.2)
    speed = {name: rows * count / value for name, value in seconds.items()}
    starts = [sorted(answer.first_token_seconds for answer in answers) for answers in found["ours"]]
    ends = [max(answer.seconds for answer in answers) for answers in found["ours"]]
    step = statistics.median((end - first[-1]) / max(1, count - 1) for first, end in zip(starts, ends))
    read = step_bytes(transformer, rows, bench.prompt_tokens + count // 2)
    peak = devices.peak_bandwidth(jax.devices()[0])
    return (
        {"rows": rows, "tokens_per_second": speed["ours"], "peer_tokens_per_second": speed.get("peer")}
        | {"ratio": speed["ours"] / speed["peer"] if torch else None, "answers_equal_to_peer": equal}
        | {"first_token_seconds": statistics.median(first[0] for first in starts), "token_seconds": step}
        | {"decode_tokens_per_second": rows / step, "compile_seconds": first_seconds - seconds["ours"]}
        | {"step_bytes": read, "copy_bytes_per_second": copied, "roofline_fraction": read / step / copied}
        | {"fraction_of_peak_bandwidth": read / step / peak if peak else None}
        | report.facts_of(transformer.config, transformer.dtype)
    )


def step_bytes(transformer: Transformer, rows: int, length: int) -> int:
    """Bytes that one decoding step must read: every matrix once, and each row's cache for `length` positions."""
    c, counts = transformer.config, parameter_counts(transformer.config)
    matrices = counts["total"] - counts["value_embeddings"] - (0 if c.tied else counts["embed"])
    cache = jax.tree.leaves(jax.eval_shape(lambda: transformer.empty_cache(rows, length, write=0)).layers)
    return jnp.dtype(transformer.dtype).itemsize * (matrices + sum(leaf.size for leaf in cache))


def copy_bandwidth() -> float:
    """Bytes per second of a copy much larger than any cache, read and written, the best of several."""
    source = jnp.zeros((1 << (26 if jax.default_backend() == "cpu" else 28),), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * source.nbytes / min(timing.timed(lambda: copy(source).block_until_ready())[1] for _ in range(9))


def cache_gain(transformer: Transformer, weights: Any, bench: options.Bench, count: int) -> dict[str, Any]:
    """Seconds for an answer with the cache, and with a compiled forward pass over the whole text for each token."""
    (prompt,) = random_prompts(transformer.config.vocab, 1, bench.prompt_tokens)
    asked = SamplingParams(bench.temperature, top_k=bench.top_k, top_p=bench.top_p, max_tokens=count, ignore_end=True)
    engine, rows = make_engine(transformer, weights, bench, length=len(prompt) + count, slots=1), pack([(asked, 0)])

    @jax.jit
    def step(params: Any, ids_1T: jax.Array, size: jax.Array) -> jax.Array:
        hidden_1TM = transformer.apply(params, ids_1T).hidden
        last_11M = jax.lax.dynamic_slice_in_dim(hidden_1TM, size - 1, 1, axis=1)
        logits_1V = transformer.logits(params, last_11M)[:, 0]
        return choose(logits_1V, rows, (size - 1)[None], level=asked.level).token_B[0]

    def naive() -> tuple[int, ...]:
        ids = list(prompt)
        while len(ids) < len(prompt) + count:
            padded_1T = np.pad(np.array([ids], np.int32), ((0, 0), (0, -len(ids) % 64)))
            ids.append(int(step(engine.params, padded_1T, np.int32(len(ids)))))
        return tuple(ids[len(prompt) :])

    sides = {"cached_seconds": lambda: generate(engine, [prompt], asked)[0].tokens, "naive_seconds": naive}
    cached, naively = (side() for side in sides.values())
    seconds, _ = timing.alternate(sides, bench.repeats)
    row = {"tokens": count, **seconds, "ratio": seconds["naive_seconds"] / seconds["cached_seconds"]}
    return row | {"equal": cached == naively}


def stored_prefixes(transformer: Transformer, weights: Any, bench: options.Bench) -> dict[str, Any]:
    """How much longer answers take beside four times as many stored prefixes, some of which the prompts continue."""
    (shared,), tails = (random_prompts(transformer.config.vocab, rows, bench.prompt_tokens) for rows in (1, 4))
    params, sides = SamplingParams(0.0, max_tokens=bench.decode_tokens, ignore_end=True), {}
    prefixes = [[*shared, 1 + i // 32, 1 + i % 32] for i in range(MANY)]
    asked = [[*prefix, *tail] for prefix, tail in zip(prefixes, tails)]
    for count in (FEW, MANY):
        shape = {"length": len(asked[0]) + bench.decode_tokens, "slots": 4, "prefix_cache_bytes": 1 << 34}
        engine = make_engine(transformer, weights, bench, **shape)
        engine.generate([Request(prefix, SamplingParams(0.0, max_tokens=1), store=True) for prefix in prefixes[:count]])
        before = engine.prompt_stats.reused
        generate(engine, asked, params)
        assert engine.prompt_stats.reused - before == sum(map(len, prefixes[:4])), "what is stored is used"
        sides[str(len(engine.prefixes))] = partial(generate, engine, asked, params)
    few, many = (seconds := timing.alternate(sides, 4 * bench.repeats)[0]).values()
    return {"stored": [int(name) for name in seconds], "seconds": [few, many], "ratio": many / few}


def speculation(transformer: Transformer, weights: Any, bench: options.Bench) -> dict[str, Any]:
    """How much faster speculation is at batch 1 on text that repeats one token, and on random text."""
    (prompt,), count = random_prompts(transformer.config.vocab, 1, bench.prompt_tokens), 4 * bench.decode_tokens
    constant, found = weights | {"ends": weights["ends"] | {"head": 0 * weights["ends"]["head"]}}, dict[str, Any]()
    for name, temperature, own in (("constant", 0.0, constant), ("random", 1.0, weights)):
        asked = [prompt], SamplingParams(temperature, max_tokens=count, ignore_end=True)
        make = partial(make_engine, transformer, own, bench, length=len(prompt) + count, slots=1)
        sides = {"plain": partial(generate, make(), *asked), "guessing": partial(generate, make(Speculation()), *asked)}
        plain, guessing = (side()[0].tokens for side in sides.values())
        seconds, _ = timing.alternate(sides, bench.repeats)
        found[name] = {"ratio": seconds["plain"] / seconds["guessing"], "equal": plain == guessing}
    return found
