"""Implements launch.evaluate: scores a checkpoint and keeps records from which an interrupted evaluation resumes."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax

from jaxchat import checkpoint, processes
from jaxchat.data.cache import locked
from jaxchat.errors import UserError
from jaxchat.evaluation import evaluate
from jaxchat.evaluation.compare import compare
from jaxchat.evaluation.published import report
from jaxchat.evaluation.table import score_table
from jaxchat.experiment import Experiment
from jaxchat.launcher import log
from jaxchat.loading import load_checkpoint, load_engine
from jaxchat.paths import user_path
from jaxchat.serialization import to_json
from jaxchat.sharding import decoding_mesh
from jaxchat.tasks.humaneval import check_sandbox


def run(options: Any) -> Mapping[str, object] | None:
    """Runs launch.evaluate: evaluates a checkpoint, compares two evaluations, or checks the sandbox.

    Raises:
        UserError: an option is invalid, or what it names does not exist.
    """
    if options.compare:
        if len(options.compare) != 2:
            raise UserError("--compare needs two directories of results, such as runs/NAME/sft/eval/500-...")
        return compare(*map(user_path, options.compare))
    if options.sandbox_check:
        return check_sandbox(options.sandbox_check)
    if not options.checkpoint:
        raise UserError("give a checkpoint, such as --checkpoint=runs/tiny/pretrain")
    for name, least in (("limit", 0), ("max_tokens", 1), ("samples", 1), ("slots", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}={getattr(options, name)} must be at least {least}")
    with processes.joined():
        return processes.from_first(score(options))


def score(options: Any) -> Mapping[str, object]:
    """Evaluates a checkpoint; writes records, results and a comparison with published scores. Returns the output
    directory and the result of every task."""
    directory, step = checkpoint.locate(options.checkpoint)
    runs = directory.parent.parent
    jax.config.update("jax_compilation_cache_dir", str((runs / "cache" / "xla").absolute()))
    mesh = decoding_mesh(options.mesh)
    chats = checkpoint.read_experiment(directory, Experiment).chats
    style = options.style if options.style != "auto" else ("chat" if chats else "text")
    if style == "chat" and not chats:
        log(f"warning: {directory} was not trained on conversations; use --style=text to prompt it as a base model")
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(evaluate.Settings)}
    settings = evaluate.Settings(**given | {"style": style, "limit": options.limit or None})
    processes.check_same("the evaluation", (options, step), "start every process with the same command")
    tasks = evaluate.parse_tasks(options.tasks, settings, runs / "cache" / "downloads")
    inputs = evaluate.read(tasks, load_checkpoint(f"{directory}@{step}").tokenizer, settings.limit)
    engine = load_engine(f"{directory}@{step}", mesh=mesh, slots=options.slots, prefill_batch=min(8, options.slots))
    params = checkpoint.params_hash(directory, step)  # A step can be trained again, to other parameters.
    about = {"checkpoint": str(directory), "step": step, "params": params, "length": engine.shape.length}
    key = json.dumps([params, to_json(settings)], sort_keys=True)
    name = f"{step}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    out = user_path(options.out) if options.out else directory / "eval" / name
    if jax.process_index():
        return evaluate.evaluate(engine, tasks, inputs, settings, out, about, log=lambda _: None)
    refusal = f"another process is writing an evaluation to {out}: wait until it has finished, or set another --out"
    with locked(out, log, refusal=refusal, option="--out"):
        results = evaluate.evaluate(engine, tasks, inputs, settings, out, about, log=log)
    all_results = evaluate.merge_results(out / "results.json", {**about, "settings": to_json(settings)}, results)
    score_table(results, sys.stderr)
    if options.mode == "nanochat":  # The published scores use nanochat's prompts.
        report(out, all_results, log)
    return {"out": str(out), **results}
