"""Compiles what an engine needs to serve, before the first request."""

import itertools

from jaxchat.decode.engine import Engine
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams

# One request of each kind of program: greedy, plain and full sampling, and penalties.
KINDS: tuple[dict[str, float], ...] = ({"temperature": 0.0}, {}, {"top_k": 2}, {"presence_penalty": 0.5})


def warm(engine: Engine) -> None:
    """Answers requests of every kind of program: sampling levels with and without the most likely tokens, lengths of
    prompts, and stored prefixes.
    """
    first, tokens = engine.tokenizer.bos, engine.shape.steps + 1
    lengths = [1]
    while lengths[-1] * 2 + tokens < engine.shape.length:
        lengths.append(lengths[-1] * 2)
    batches = [1]
    while engine.shape.adapt and batches[-1] < engine.shape.slots:
        batches.append(min(2 * batches[-1], engine.shape.slots))
    for batch, kind, top in itertools.product(batches, KINDS, (0, 1)):
        sampling = SamplingParams(**kind, max_tokens=tokens, ignore_end=True)  # type: ignore[arg-type]
        engine.generate([Request([first], sampling, n=batch, keep=True, top_logprobs=top)])
    for length in lengths:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_end=True)
        for _ in range(2):
            engine.generate([Request([first] * length, sampling, keep=True)])
        engine.score([first] * (length + 1))
    engine.prefixes.clear()
