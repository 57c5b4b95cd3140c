"""What launch.inspect does: writes the values of a text or of a step as JSON, and the pictures of them as PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxchat import checkpoint
from jaxchat.data.cache import make_directory, write_text
from jaxchat.decode.engine import Engine
from jaxchat.decode.requests import Request
from jaxchat.decode.sampling import SamplingParams
from jaxchat.errors import UserError
from jaxchat.evaluation.curves import drawing
from jaxchat.experiment import Experiment
from jaxchat.inspection import pictures, tables, text, tokens
from jaxchat.inspection.steps import look_at_step
from jaxchat.launcher import log
from jaxchat.loading import load_engine
from jaxchat.paths import user_path
from jaxchat.serialization import json_line
from jaxchat.tokenizer import chat

MOST_TOKENS = 256  # Pictures of longer texts cannot be read, and attention grows with the square.


def run(options: Any) -> dict[str, Any]:
    """Runs launch.inspect and returns the result for its last line."""
    if bool(options.run) == bool(options.checkpoint):
        raise UserError("name what to look at: --checkpoint with --text or --prompt, or --run with --step")
    if options.step and not options.run:
        named = f"{options.checkpoint.partition('@')[0]}@{options.step}"
        raise UserError(f"--step is a step of --run: to look at a text with a checkpoint, set --checkpoint={named}")
    if options.run and (options.text is not None or options.prompt is not None):
        raise UserError("--run looks at the texts of a step: for a text of your own, give --checkpoint instead")
    return _step(options) if options.run else _text(options)


def _step(options: Any) -> dict[str, Any]:
    if options.step < 1:
        raise UserError(f"--step={options.step} must be at least 1: name a step of metrics.jsonl")
    place, _ = checkpoint.locate(options.run)
    out = _out(options, place, f"step-{options.step}")
    found = look_at_step(place, options.step, most=options.replay, log=log)
    files = write(out, {"step": found}, log=log)
    summary = {name: found[name] for name in ("step", "from", "loss", "equal", "changed")}
    worst = [{name: d[name] for name in ("row", "start", "loss", "share")} for d in found["documents"][:5]]
    return summary | {"documents": len(found["documents"]), "worst": worst, "out": str(out), "files": files}


def _text(options: Any) -> dict[str, Any]:
    if (options.text is None) == (options.prompt is None):
        raise UserError("give --text, a text to look into, or --prompt, to look into the model's answer to it")
    directory, step = checkpoint.locate(options.checkpoint)
    jax.config.update("jax_compilation_cache_dir", str((directory.parent.parent / "cache" / "xla").absolute()))
    out = _out(options, directory, f"text-{step}")
    sampling = SamplingParams(
        options.temperature, **options.truncation, max_tokens=options.max_tokens, seed=options.seed
    )
    engine = load_engine(f"{directory}@{step}", slots=1)
    trained: Experiment = checkpoint.read_experiment(directory, Experiment)
    chats = trained.chats if options.style == "auto" else options.style == "chat"
    prompt, answer = asked(engine, options, sampling, chats=chats)
    ids = [*prompt, *answer]
    if len(ids) > MOST_TOKENS:
        raise UserError(f"the text has {len(ids)} tokens, but pictures show at most {MOST_TOKENS}: shorten it")
    if not -len(ids) <= options.token < len(ids):
        raise UserError(f"there is no token {options.token}: the text has tokens 0 to {len(ids) - 1}")
    values = look(engine, prompt, answer, sampling, token=options.token % len(ids))
    if options.steps:
        start = ids if options.prompt is None else prompt
        values["checkpoints"] = tables.over_steps(engine, directory, start, ids, sampling)
    files = write(out, values, log=log)
    return {"step": step, "tokens": len(ids), "text": values["tokens"]["text"], "out": str(out), "files": files}


def asked(engine: Engine, options: Any, sampling: SamplingParams, *, chats: bool) -> tuple[list[int], list[int]]:
    """Ids before the part that is looked into, and of that part: the text, or the answer to the prompt."""
    tokenizer = engine.tokenizer
    if options.text is not None:
        return [tokenizer.bos], tokenizer.encode(options.text)
    prompt = chat.asked(options.prompt, tokenizer, in_turns=chats)
    (answer,) = engine.generate([Request(prompt, sampling)])[0]
    if answer.error:
        raise UserError(answer.error)
    return prompt, list(answer.tokens)


def look(
    engine: Engine, prompt: list[int], answer: list[int], sampling: SamplingParams, *, token: int
) -> dict[str, Any]:
    """Everything about one text that is drawn, by name; `token` is the one whose candidates and neighbours are."""
    ids, tokenizer = [*prompt, *answer], engine.tokenizer
    view, shown = text.look(engine, ids), tokens.tokens(tokenizer, ids)
    names = [one["name"] for one in shown]
    near = tables.neighbours(engine, ids[token])
    if token < len(prompt):
        log(f"token {token} was given, so it has no candidates: those of token {len(prompt)} are drawn")
    values: dict[str, Any] = {
        "tokens": {"text": tokenizer.decode(ids, keep_specials=True), "tokens": shown},
        "candidates": {
            "first": len(prompt),
            "token": max(token - len(prompt), 0),
            "steps": text.candidates(engine, prompt, answer, sampling),
            "sampling": {"temperature": sampling.temperature, **sampling.truncation},
        },
        "lens": {"names": names, "rows": text.lens(view)},
        "neighbours": {"token": ids[token], "name": names[token], "neighbours": near},
        "map": tables.embedding_map(engine) | {"marked": sorted({*ids, *(one["token"] for one in near)})},
        "cache": tables.cache_bytes(engine.transformer, engine.shape.length),
    }
    if len(ids) > 1:
        values["losses"] = {"first": names[0], "tokens": text.losses(engine, ids)}
    for layer, attended in enumerate(view.trace.attended):
        if attended is not None:
            heads = [text.attention(view, layer, head) for head in range(attended.q_BTHD.shape[2])]
            values[f"attention-{layer}"] = {"layer": layer, "names": names, "heads": heads}
    try:
        values["merges"] = tokens.merges(tokenizer, tokenizer.decode(ids))
    except UserError as error:
        log(f"no merges are written: {error}")
    return values


def _out(options: Any, directory: Path, name: str) -> Path:
    out = user_path(options.out) if options.out else directory / "inspect" / name
    make_directory(out, "--out")
    drawing()  # Before anything slow: raises a UserError without matplotlib.
    return out


def write(out: Path, values: Mapping[str, Any], *, log: Any) -> list[str]:
    """Writes NAME.json for every value and the pictures that `pictures.PICTURES` has for it; returns the file names."""
    files = []
    for name, value in values.items():
        write_text(out / f"{name}.json", json_line(value, ascii_only=False) + "\n")
        kind, dash, rest = name.partition("-")
        files += [f"{name}.json", *pictures.draw(out, kind, dash + rest, value)]
        log(f"wrote {out / name}.json")
    return files
