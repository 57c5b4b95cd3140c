"""Speed of rollouts: many prompts with many samples at once, beside one prompt and beside one sample at a time.

Every token ends its answer with probability 2 / `decode_tokens`, so that answers differ in length.
"""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks import decoding, options, report, timing
from jaxchat.decode.engine import Engine, EngineConfig
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.model.transformer import Transformer


def run(bench: options.Bench, arguments: list[str]) -> dict[str, Any]:
    return measure(*decoding.random_model(options.load(bench, arguments)), bench) | report.surroundings(bench)


def measure(transformer: Transformer, weights: Any, bench: options.Bench) -> dict[str, Any]:
    """Rollouts per second in each of the three ways."""
    prompts = list(enumerate(decoding.random_prompts(transformer.config.vocab, bench.prompts, bench.prompt_tokens)))
    ends = tuple(range(1, 1 + max(1, 2 * transformer.config.vocab // bench.decode_tokens)))

    def way(slots: int, samples: int, group: int) -> Callable[[], list[Any]]:
        """Asks for `samples` answers to each prompt, `group` prompts at a time."""
        shape = EngineConfig(bench.prompt_tokens + bench.decode_tokens, slots=slots, prefill_batch=min(8, slots))
        engine = Engine(transformer, weights, decoding.TOKENIZER, shape)
        params = lambda seed: SamplingParams(1.0, max_tokens=bench.decode_tokens, stop_tokens=ends, seed=seed)  # noqa: E731
        asked = [Request(prompt, params(seed), n=samples) for seed, prompt in prompts]
        parts = [asked[i : i + group] for i in range(0, len(asked), group)]
        return lambda: [answer for part in parts for answers in engine.generate(part) for answer in answers]

    sides = {"together": way(bench.slots, bench.samples, bench.prompts)}
    sides |= {"a_prompt_at_a_time": way(bench.samples, bench.samples, 1), "a_sample_at_a_time": way(1, 1, 1)}
    counts = {name: len(side()) for name, side in sides.items()}
    seconds, found = timing.alternate(sides, bench.repeats, 0.2)
    speed = {name: count / seconds[name] for name, count in counts.items()}
    tokens, together = statistics.mean(len(answer.tokens) for answer in found["together"][-1]), speed.pop("together")
    ratios = {f"ratio_to_{name}": together / value for name, value in speed.items()}
    row = {"rollouts_per_second": together, "tokens_per_second": together * tokens, "answer_tokens": tokens}
    return row | ratios | speed | report.facts_of(transformer.config, transformer.dtype)
