"""Compiles what an engine needs to serve, before the first request."""

import itertools
from collections.abc import Sequence
from typing import Any

from jaxchat.decode.engine import Engine
from jaxchat.decode.prompts import SHORTEST_CHUNK, SHORTEST_ROW, PrefillPlan, read
from jaxchat.decode.requests import Completion, Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.inspection import text

MOST_TOKENS = 256  # Of one look into a text: attention grows with the square.

# One request of each kind of program: greedy, plain and full sampling, and penalties.
KINDS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {}, {"top_k": 2}, {"presence_penalty": 0.5})


def warm(engine: Engine) -> None:
    """Runs every program that requests can need: each length of prompts and of chunks, each kind of sampling with and
    without the most likely tokens, and stored prefixes of each length before prompts of each length. With `adapt`, also
    batches of each size, but not each change of size.
    """
    shape, first, tokens = engine.shape, engine.tokenizer.bos, engine.shape.steps + 1

    def answer(prompt: list[int], n: int = 1, store: bool = False, top: int = 0, **sampling: Any) -> Completion:
        params = SamplingParams(**sampling, max_tokens=tokens, ignore_end=True)
        return engine.generate([Request(prompt, params, n=n, store=store, top_logprobs=top)])[0][0]

    rows = [row for row in _powers(SHORTEST_ROW, shape.length) if row // 2 + tokens < shape.length]
    prompts = {row: [first] * (row // 2 + 1 if row > SHORTEST_ROW else 1) for row in rows}
    batches = _powers(1, shape.slots) if shape.adapt else [1]
    for batch, kind, top in itertools.product(batches, KINDS, (0, 1)):
        for row in rows if batch == 1 else rows[:1]:
            for before in (KINDS[0], KINDS[-1]):  # Penalties leave counts that the next sample enters beside.
                answer([first], **before)
                answer(prompts[row], batch, top=top, **kind)
    for row in rows:
        longest = min(shape.prefill_chunk, row)
        answer(prompts[row], store=True, temperature=0.0)
        stored = engine.prefixes.find([first, first])  # A cache that a prefix was copied to is another argument to XLA.
        for size, found in itertools.product(_powers(SHORTEST_CHUNK, longest), (None, stored)):
            plan = PrefillPlan(row, longest, (size,))
            with engine.on_mesh():
                for _ in read(
                    engine.transformer, engine.params, [[first] * 2], [found], plan, rows=shape.prefill_batch
                ):
                    pass
    for shorter, row in itertools.combinations_with_replacement(rows, 2):
        engine.prefixes.clear()
        begun = answer(prompts[shorter], store=True, temperature=0.0)
        text = [*prompts[shorter], *begun.tokens[:-1]]
        answer(text + [first] * max(1, len(prompts[row]) - len(text)), temperature=0.0)
    for length in _powers(SHORTEST_CHUNK, shape.length):
        engine.score([first] * length)
    engine.prefixes.clear()


def warm_views(engine: Engine) -> None:
    """Runs the programs of the microscope that `warm` does not: attention and lens, of one padded length."""
    view = look(engine, [engine.tokenizer.bos])
    for layer, attended in enumerate(view.trace.attended):
        if attended is not None:
            text.attention(view, layer, 0)
    text.lens(view)


def look(engine: Engine, ids: Sequence[int]) -> text.View:
    """Looks into a text of at most MOST_TOKENS tokens, padded to that, so that one program serves all lengths."""
    ids = engine.check(ids, what="the text", room=0)
    most = min(MOST_TOKENS, engine.shape.length)
    if len(ids) > most:
        raise UserError(f"the text has {len(ids)} tokens, but attention and lens show at most {most}: shorten it")
    return text.look(engine, [*ids, *[0] * (most - len(ids))])._replace(ids=ids)


def _powers(start: int, end: int) -> list[int]:
    """`start` doubled until it reaches `end`, which is the last."""
    sizes = [min(start, end)]
    while sizes[-1] < end:
        sizes.append(min(2 * sizes[-1], end))
    return sizes
