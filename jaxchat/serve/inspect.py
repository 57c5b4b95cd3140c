"""The routes of the microscope: POST /inspect/VIEW with the name of a model and what to look at; `VIEWS` lists them.

What asks the model runs in the thread of its engine, between two steps; the rest beside it. All views of the model use
programs that `warm` and `warm_views` compile: losses those of scores, candidates those of prompts, attention and lens
those of one padded length. The latest answers of a model are kept.
"""

import asyncio
import base64
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, Any, NamedTuple

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import Field

from jaxchat.decode.explain import name_of
from jaxchat.errors import NOT_FINITE, UserError
from jaxchat.inspection import tables, text, tokens
from jaxchat.model.attention import MIXERS
from jaxchat.serialization import json_line
from jaxchat.serve import protocol
from jaxchat.serve.errors import ApiError
from jaxchat.serve.models import Model
from jaxchat.serve.protocol import Body, Id, Ids, Name
from jaxchat.serve.warming import MOST_TOKENS, look
from jaxchat.tokenizer import chat

MOST_NAMED, MOST_POINTS, MOST_PLACES = 100, 2000, 64  # Candidates with names, points of a map, columns of a lens.
MOST_LETTERS = 200  # Of a replay of merges: its size grows with the square of a word.
MOST_KEPT, MOST_RUNNING = 32, 32  # Answers kept for each model; requests under way in the whole server.


class Of(Body):
    model: Name | None = None


class Said(Of):
    """A text, messages, which may end with an answer, or token ids."""

    prompt: str | None = None
    messages: Annotated[list[protocol.ChatMessage], Field(min_length=1, max_length=protocol.MOST_MESSAGES)] | None = (
        None
    )
    ids: Ids | None = None


class Text(Of):
    ids: Ids


class Place(Text):
    """`position`: number of tokens before the one whose candidates are wanted; the whole text if null."""

    position: Annotated[int, Field(ge=1)] | None = None
    count: Annotated[int, Field(ge=1, le=MOST_NAMED)] = 20


class Head(Text):
    layer: Annotated[int, Field(ge=0)] = 0
    head: Annotated[int, Field(ge=0)] = 0


class Places(Text):
    """Tokens `start` to `start` + `places` of a text, with `count` candidates each."""

    start: Annotated[int, Field(ge=0)] = 0
    places: Annotated[int, Field(ge=1, le=MOST_PLACES)] = MOST_PLACES
    count: Annotated[int, Field(ge=1, le=text.LENS)] = 5


class Near(Of):
    token: Id
    count: Annotated[int, Field(ge=1, le=MOST_NAMED)] = 12


class Points(Of):
    """Tokens that are on the map in any case; the others are spread evenly over the vocabulary."""

    tokens: Annotated[list[Id], Field(max_length=MOST_POINTS // 2)] = Field(default_factory=list)


class Word(Of):
    prompt: Annotated[str, Field(max_length=MOST_LETTERS)]


def about(model: Model, body: Of) -> Any:
    """What the page offers: heads of each layer (0: no attention), sizes and limits."""
    engine, config = model.worker.engine, model.worker.engine.transformer.config
    kernels = [MIXERS[type(mixer)].kernel(mixer) for mixer in config.mixers]
    sizes = {"heads": [kernel.heads if kernel else 0 for kernel in kernels], "vocab": config.vocab}
    limits = {"most_tokens": min(MOST_TOKENS, engine.shape.length), "most_places": MOST_PLACES}
    return {"model": model.entry.name, **sizes, "length": engine.shape.length, **limits, "most_letters": MOST_LETTERS}


def shown(model: Model, body: Said) -> Any:
    """Tokens with ids, bytes and names, as many as the context has; `count` is the number of all."""
    tokenizer, given = model.loaded.tokenizer, (body.prompt, body.messages, body.ids)
    if sum(one is not None for one in given) != 1:
        raise ApiError(400, "give one of prompt, messages and ids", param="prompt")
    ids = body.ids or []
    if body.messages:
        ids = protocol.Chat(messages=body.messages).prompt(tokenizer, whole=True)
    elif body.prompt is not None:
        ids = chat.encode(body.prompt, tokenizer, begin=True)
    engine = model.worker.engine
    first = engine.check(ids[: engine.shape.length], what="the text", room=0)
    return {"tokens": tokens.tokens(tokenizer, first), "count": len(ids)}


def losses(model: Model, body: Text) -> Any:
    """Loss in nats of every token but the first, and what was expected in its place, with its probability."""
    engine, found = model.worker.engine, []
    for token in engine.score(body.ids):
        best, logprob = token.top[0]
        expected = {"name": name_of(engine.tokenizer, best), "probability": math.exp(logprob)}
        found.append({"token": token.id, "loss": -token.logprob, "expected": expected})
    return {"tokens": found}


def candidates(model: Model, body: Place) -> Any:
    """The most likely tokens at one place, and the one that is there (none after the end). `logits` has those of the
    whole vocabulary, float32 in base64, so that a page applies sampling by itself."""
    engine = model.worker.engine
    ids = engine.check(body.ids, what="the text", room=0)
    position = len(ids) if body.position is None else body.position
    if position > len(ids):
        raise UserError(f"there is no position {position}: the text has {len(ids)} tokens")
    with engine.on_mesh():
        logits_V = np.asarray(engine.read(ids[:position])[1], np.float32)[0]
    if not np.isfinite(logits_V).all():
        raise UserError(NOT_FINITE)
    best, there = np.argsort(-logits_V, kind="stable")[: body.count].tolist(), ids[position : position + 1]
    found = [
        {"token": i, "name": name_of(engine.tokenizer, i), "logit": float(logits_V[i]), "chosen": i in there}
        for i in [*best, *(i for i in there if i not in best)]
    ]
    packed = base64.b64encode(logits_V.astype("<f4").tobytes()).decode()
    normaliser = float(np.logaddexp.reduce(logits_V.astype(np.float64)))
    return {"position": position, "candidates": found, "logits": packed, "log_normaliser": normaliser}


def _view(model: Model, body: Text) -> text.View:
    """The trace of a text; that of the latest text is kept."""
    if model.view is None or model.view.ids != tuple(body.ids):
        model.view = look(model.worker.engine, body.ids)
    return model.view


def attention(model: Model, body: Head) -> Any:
    """Weights of one head: row t is how much token t takes from each token up to itself."""
    return {"weights": text.attention(_view(model, body), body.layer, body.head)}


def lens(model: Model, body: Places) -> Any:
    """What the model would say next after 0, 1, ... layers."""
    view = _view(model, body)
    places = range(body.start, min(body.start + body.places, len(view.ids)))
    return {"start": body.start, "rows": text.lens(view, count=body.count, places=places)}


def near(model: Model, body: Near) -> Any:
    """Tokens whose embeddings point most nearly the same way."""
    return {"neighbours": tables.neighbours(model.worker.engine, body.token, count=body.count)}


def points(model: Model, body: Points) -> Any:
    """Embeddings on their first two principal components."""
    engine = model.worker.engine
    vocab = engine.transformer.config.vocab
    if unknown := [token for token in body.tokens if token >= vocab]:
        raise UserError(f"there is no token {unknown[0]}: the vocabulary has ids 0 to {vocab - 1}")
    spread = range(0, vocab, math.ceil(vocab / (MOST_POINTS - len(body.tokens))))
    return tables.embedding_map(engine, sorted({*body.tokens, *spread}))


def cache(model: Model, body: Of) -> Any:
    """Bytes of the cache of one answer by number of tokens."""
    return tables.cache_bytes(model.worker.engine.transformer, model.worker.engine.shape.length)


def merges(model: Model, body: Word) -> Any:
    """The merges of the tokenizer that form each part of a text."""
    return {"parts": tokens.merges(model.loaded.tokenizer, body.prompt)}


class View(NamedTuple):
    """A view: its body, its function, and whether it asks the model, in the thread of the engine."""

    body: type[Of]
    look: Callable[[Model, Any], Any]
    asks: bool = False


VIEWS = {
    "about": View(Of, about),
    "tokens": View(Said, shown),
    "losses": View(Text, losses, asks=True),
    "candidates": View(Place, candidates, asks=True),
    "attention": View(Head, attention, asks=True),
    "lens": View(Places, lens, asks=True),
    "neighbours": View(Near, near),
    "map": View(Points, points),
    "cache": View(Of, cache),
    "merges": View(Word, merges),
}


def _add(router: APIRouter, name: str, view: View) -> None:
    running = 0

    async def answer(body: Any, request: Request) -> Response:
        nonlocal running
        if running >= MOST_RUNNING:
            raise ApiError(429, f"{running} looks are under way already", code="queue_full", retry_after=1)
        running += 1
        try:
            with ExitStack() as stack:
                model = await request.app.state.models.use(body.model)
                stack.callback(model.release)
                return Response(await _answer(name, view, model, body), media_type="application/json")
        finally:
            running -= 1

    answer.__annotations__["body"], answer.__doc__ = view.body, view.look.__doc__
    router.post(f"/inspect/{name}", name=f"inspect_{name}")(answer)


async def _answer(name: str, view: View, model: Model, body: Of) -> bytes:
    key = name + body.model_dump_json(exclude={"model"})
    if key not in model.views:
        if view.asks:
            found = await model.worker.call(lambda _: view.look(model, body))
        else:
            found = await asyncio.to_thread(view.look, model, body)
        model.views[key] = (await asyncio.to_thread(json_line, found)).encode()
    model.views.move_to_end(key)
    while len(model.views) > MOST_KEPT:
        model.views.popitem(last=False)
    return model.views[key]


async def views() -> dict[str, Any]:
    """The views that this server has."""
    return {"views": list(VIEWS)}


def _routes() -> APIRouter:
    router = APIRouter()
    router.get("/inspect")(views)
    for name, view in VIEWS.items():
        _add(router, name, view)
    return router


router = _routes()
