"""The routes of the microscope: POST /inspect/VIEW with the name of a model and what to look at; `VIEWS` lists them.

What asks the model runs in the thread of its engine, between two steps; the rest beside it. All views of the model use
programs that `warm` and `warm_views` compile: losses those of scores, candidates those of prompts, attention and lens
those of one padded length. The trace of the latest text of a model is kept.
"""

import asyncio
import base64
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from inspect import Parameter, signature
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import Field, create_model

from jaxchat.decode.explain import name_of
from jaxchat.errors import NOT_FINITE, UserError
from jaxchat.inspection import tables, text, tokens
from jaxchat.model.attention import MIXERS
from jaxchat.serialization import json_line
from jaxchat.serve import protocol
from jaxchat.serve.errors import ApiError
from jaxchat.serve.models import Model
from jaxchat.serve.protocol import Id, Ids, Name
from jaxchat.serve.warming import MOST_TOKENS, look
from jaxchat.tokenizer import chat

MOST_NAMED, MOST_POINTS, MOST_PLACES = 100, 2000, 64  # Candidates with names, points of a map, columns of a lens.
MOST_LETTERS = 200  # Of a replay of merges: its size grows with the square of a word.
MOST_RUNNING = 32  # Looks under way in the whole server.


Count = Annotated[int, Field(ge=1, le=MOST_NAMED)]
Number = Annotated[int, Field(ge=0)]


def about(model: Model) -> Any:
    """What the page offers: heads of each layer (0: no attention), sizes and limits."""
    engine, config = model.engine, model.engine.transformer.config
    kernels = [MIXERS[type(mixer)].kernel(mixer) for mixer in config.mixers]
    sizes = {"heads": [kernel.heads if kernel else 0 for kernel in kernels], "vocab": config.vocab}
    limits = {"most_tokens": min(MOST_TOKENS, engine.shape.length), "most_places": MOST_PLACES}
    return {"model": model.entry.name, **sizes, "length": engine.shape.length, **limits, "most_letters": MOST_LETTERS}


def shown(
    model: Model, prompt: str | None = None, messages: protocol.Messages | None = None, ids: Ids | None = None
) -> Any:
    """Tokens with ids, bytes and names of a text, messages, which may end with an answer, or token ids; as many as the
    context has. `count` is the number of all."""
    tokenizer, engine = model.loaded.tokenizer, model.engine
    if sum(one is not None for one in (prompt, messages, ids)) != 1:
        raise ApiError(400, "give one of prompt, messages and ids", param="prompt")
    if messages:
        ids = protocol.Chat(messages=messages).prompt(tokenizer, whole=True)
    elif prompt is not None:
        ids = chat.encode(prompt, tokenizer, begin=True)
    ids = ids or []
    first = engine.check(ids[: engine.shape.length], what="the text", room=0)
    return {"tokens": tokens.tokens(tokenizer, first), "count": len(ids)}


def losses(model: Model, ids: Ids) -> Any:
    """Loss in nats of every token but the first, and what was expected in its place, with its probability."""
    found = []
    for token in model.engine.score(ids):
        best, logprob = token.top[0]
        expected = {"name": name_of(model.engine.tokenizer, best), "probability": math.exp(logprob)}
        found.append({"token": token.id, "loss": -token.logprob, "expected": expected})
    return {"tokens": found}


def candidates(model: Model, ids: Ids, position: Annotated[int, Field(ge=1)] | None = None, count: Count = 20) -> Any:
    """The most likely tokens after the first `position` tokens (null: after all), and the one that is there. `logits`
    has those of the whole vocabulary, float32 in base64, so that a page applies sampling by itself."""
    engine = model.engine
    engine.check(ids, what="the text", room=0)
    position = len(ids) if position is None else position
    if position > len(ids):
        raise UserError(f"there is no position {position}: the text has {len(ids)} tokens")
    with engine.on_mesh():
        logits_V = np.asarray(engine.read(ids[:position])[1], np.float32)[0]
    if not np.isfinite(logits_V).all():
        raise UserError(NOT_FINITE)
    best, there = np.argsort(-logits_V, kind="stable")[:count].tolist(), ids[position : position + 1]
    found = [
        {"token": i, "name": name_of(engine.tokenizer, i), "logit": float(logits_V[i]), "chosen": i in there}
        for i in [*best, *(i for i in there if i not in best)]
    ]
    packed = base64.b64encode(logits_V.astype("<f4").tobytes()).decode()
    normaliser = float(np.logaddexp.reduce(logits_V.astype(np.float64)))
    return {"position": position, "candidates": found, "logits": packed, "log_normaliser": normaliser}


def _view(model: Model, ids: Ids) -> text.View:
    """The trace of a text; that of the latest text is kept."""
    if model.view is None or model.view.ids != tuple(ids):
        model.view = look(model.engine, ids)
    return model.view


def attention(model: Model, ids: Ids, layer: Number = 0, head: Number = 0) -> Any:
    """Weights of one head: row t is how much token t takes from each token up to itself."""
    return {"weights": text.attention(_view(model, ids), layer, head)}


def lens(
    model: Model,
    ids: Ids,
    start: Number = 0,
    places: Annotated[int, Field(ge=1, le=MOST_PLACES)] = MOST_PLACES,
    count: Annotated[int, Field(ge=1, le=text.LENS)] = 5,
) -> Any:
    """What the model would say next after 0, 1, ... layers, at tokens `start` to `start` + `places`."""
    view = _view(model, ids)
    shown_places = range(start, min(start + places, len(view.ids)))
    return {"start": start, "rows": text.lens(view, count=count, places=shown_places)}


def near(model: Model, token: Id, count: Count = 12) -> Any:
    """Tokens whose embeddings point most nearly the same way."""
    return {"neighbours": tables.neighbours(model.engine, token, count=count)}


def points(model: Model, tokens: Annotated[Sequence[Id], Field(max_length=MOST_POINTS // 2)] = ()) -> Any:
    """Embeddings of `tokens`, and of others spread over the vocabulary, on their first two principal components."""
    vocab = model.engine.transformer.config.vocab
    if unknown := [token for token in tokens if token >= vocab]:
        raise UserError(f"there is no token {unknown[0]}: the vocabulary has ids 0 to {vocab - 1}")
    spread = range(0, vocab, math.ceil(vocab / (MOST_POINTS - len(tokens))))
    return tables.embedding_map(model.engine, sorted({*tokens, *spread}))


def cache(model: Model) -> Any:
    """Bytes of the cache of one answer by number of tokens."""
    return tables.cache_bytes(model.engine.transformer, model.engine.shape.length)


def merges(model: Model, prompt: Annotated[str, Field(max_length=MOST_LETTERS)]) -> Any:
    """The merges of the tokenizer that form each part of a text."""
    return {"parts": tokens.merges(model.loaded.tokenizer, prompt)}


# The parameters of a view are the fields of its body, beside `model`.
VIEWS: Mapping[str, Callable[..., Any]] = {
    "about": about,
    "tokens": shown,
    "losses": losses,
    "candidates": candidates,
    "attention": attention,
    "lens": lens,
    "neighbours": near,
    "map": points,
    "cache": cache,
    "merges": merges,
}
ASKING = (losses, candidates, attention, lens)  # Those that run the model, in the thread of its engine.


def _add(router: APIRouter, name: str, view: Callable[..., Any], running: set[Request]) -> None:
    """Adds the route of a view; `running` holds the requests under way, of all views."""

    async def answer(body: Any, request: Request) -> Response:
        if len(running) >= MOST_RUNNING:
            raise ApiError(429, f"{len(running)} requests to /inspect are under way", code="queue_full", retry_after=1)
        running.add(request)
        try:
            with ExitStack() as stack:
                model = await request.app.state.models.use(body.model, stack)
                work = partial(view, model, **{field: value for field, value in body if field != "model"})
                found = await (model.worker.call(work) if view in ASKING else asyncio.to_thread(work))
                return Response(await asyncio.to_thread(json_line, found), media_type="application/json")
        finally:
            running.remove(request)

    fields: dict[str, Any] = {
        parameter.name: (parameter.annotation, ... if parameter.default is Parameter.empty else parameter.default)
        for parameter in list(signature(view).parameters.values())[1:]
    }
    base: dict[str, Any] = {"__base__": protocol.Body, "model": (Name | None, None)}
    answer.__annotations__["body"] = create_model(f"Look_{name}", **base, **fields)
    answer.__doc__ = view.__doc__
    router.post(f"/inspect/{name}", name=f"inspect_{name}")(answer)


def _routes() -> APIRouter:
    router, running = APIRouter(), set[Request]()
    for name, view in VIEWS.items():
        _add(router, name, view, running)
    return router


router = _routes()
