"""Routes for information: models, tokenizers, health, readiness, metrics."""

import asyncio
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from jaxchat.decode.sampling import PRESETS
from jaxchat.experiment import STAGES
from jaxchat.serve import protocol
from jaxchat.serve.errors import ApiError
from jaxchat.serve.inspect import VIEWS
from jaxchat.serve.models import Entry, Models
from jaxchat.tokenizer import chat

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the process lives."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Whether requests are answered: the default model is loaded, works, and the server is not shutting down."""
    state = request.app.state
    broken = [model.worker.failure for model in state.models.loaded.values() if model.worker.failure]
    reason = "the server is shutting down" if state.draining else state.starting or (broken[0] if broken else "")
    return JSONResponse({"ready": not reason, "reason": reason or None}, 503 if reason else 200)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """All models that can be asked for, in the order of the pipeline; `default` is that of requests without one,
    `presets` are settings of sampling, `views` are those of the microscope."""
    all_models: Models = request.app.state.models
    data = [_described(entry, all_models) for entry in all_models.entries.values()]
    views = list(VIEWS) if all_models.options.inspect else []
    return {"object": "list", "data": data, "default": all_models.default, "presets": PRESETS, "views": views}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """One model."""
    all_models: Models = request.app.state.models
    return _described(all_models.entry(name), all_models)


def _described(entry: Entry, all_models: Models) -> dict[str, Any]:
    about = {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "jaxchat"}
    stage = entry.directory.name
    chats = stage not in STAGES or STAGES[stage].chats
    return about | {"step": entry.step, "stage": stage, "chats": chats, "loaded": entry.key in all_models.loaded}


@router.post("/tokenize")
async def tokenize(body: protocol.Tokenize, request: Request) -> JSONResponse:
    """Token ids of a text or of a conversation. The name of a special token alone is that token."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")

    def ids() -> list[int]:
        if body.messages is not None:
            return protocol.Chat(messages=body.messages).prompt(tokenizer)
        text = body.prompt or ""
        if text in tokenizer.specials:
            return [tokenizer.specials[text]]
        return chat.encode(text, tokenizer, begin=body.add_special_tokens is not False)

    def answer() -> JSONResponse:
        tokens, length = ids(), model.engine.shape.length
        named = [tokenizer.decode([token], keep_specials=True) for token in tokens] if body.return_token_strs else None
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": length, "token_strs": named})

    with ExitStack() as stack:
        model = await request.app.state.models.use(body.model, stack)
        tokenizer = model.loaded.tokenizer
        return await asyncio.to_thread(answer)


@router.post("/detokenize")
async def detokenize(body: protocol.Detokenize, request: Request) -> dict[str, str]:
    """The text of token ids, special tokens named; bytes that are not UTF-8 become U+FFFD."""
    with ExitStack() as stack:
        tokenizer = (await request.app.state.models.use(body.model, stack)).loaded.tokenizer
    if unknown := [token for token in body.tokens if token >= tokenizer.vocab_size]:
        raise ApiError(400, f"token id {unknown[0]} is not in 0..{tokenizer.vocab_size - 1}", param="tokens")
    return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, keep_specials=True)}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """What lm-evaluation-harness asks of a remote tokenizer."""
    with ExitStack() as stack:
        used = await request.app.state.models.use(model, stack)
    tokenizer, form = used.loaded.tokenizer, used.loaded.tokenizer.chat_format
    names = {"bos_token": form.bos, "eos_token": form.end, "pad_token": form.bos}
    sizes = {"vocab_size": tokenizer.vocab_size, "model_max_length": used.engine.shape.length}
    about = {"tokenizer_class": type(tokenizer).__name__, "chat_template": chat.template(form), "hash": tokenizer.hash}
    return {**about, **names, **sizes}
