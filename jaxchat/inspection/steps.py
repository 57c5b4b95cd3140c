"""Looks at one step of a run: the texts of its batch, their losses, and the step computed again.

A step's rows, its random keys and the state before it are functions of the run's experiment and checkpoints, so the
same machine, mesh and versions give the same loss, bit for bit.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxchat import checkpoint
from jaxchat.compilation import Setup, compile_step, environment, make_setup, prepare_backend
from jaxchat.data.cache import Log
from jaxchat.decode.explain import name_of
from jaxchat.errors import UserError
from jaxchat.evaluation.curves import read_metrics
from jaxchat.experiment import STAGES, Experiment
from jaxchat.model.transformer import Params
from jaxchat.objectives.logprobs import token_logprobs
from jaxchat.stages.rows import FromText, device_batches
from jaxchat.stages.running import first_state
from jaxchat.stages.scores import TaskScores
from jaxchat.tokenizer import Tokenizer, load_tokenizer


def look_at_step(run: Path, step: int, *, most: int, log: Log) -> dict[str, Any]:
    """The documents of a step's batch with their losses, and the step replayed from the checkpoint before it.

    `run` is a stage directory. Steps are numbered from 1, as in metrics.jsonl. `replayed` lists every step that was
    computed, with its loss and gradient norm, the recorded ones, and whether they are equal bit for bit; `changed`
    names what differs from then in mesh, device, processors and versions, and is None for checkpoints of old versions,
    which do not record them. The losses by token are those of the parameters before the step, without dropout, in nats.

    Raises:
        UserError: the stage has no rows or no such step, or more than `most` steps would have to be computed.
    """
    run, _ = checkpoint.locate(str(run))
    e = _experiment(run)
    recorded = {record["step"]: record for record in read_metrics(run) if "grad_norm" in record}
    if step not in recorded:
        raise UserError(f"there is no step {step} in {run}: metrics.jsonl has steps 1 to {max(recorded, default=0)}")
    saved = [0, *checkpoint.finished_steps(run)]
    start = max(number for number in saved if number < step)
    if step - start > most:
        where = f"checkpoint {start}" if start else "step 0, because no checkpoint before it is left"
        raise UserError(f"step {step} is {step - start} steps from {where}: allow it with --replay={step - start}")
    facts = checkpoint.read_facts(run, min((number for number in saved if number >= step), default=saved[-1]))
    tokenizer, setup = load_tokenizer(run.parent / "tokenizer"), _setup(e, facts, log)
    no_tasks = TaskScores(dataclasses.replace(e, tasks=()), tokenizer, log)
    stage = STAGES[e.stage].load()(e, tokenizer, no_tasks, log)
    with jax.set_mesh(setup.mesh), contextlib.closing(stage):
        compiled = compile_step(setup, log)
        state = checkpoint.load_state(run, start, setup.abstract) if start else first_state(setup, log)
        stage.check_rows(e, facts)
        replayed = []
        with contextlib.closing(device_batches(setup, stage.stream, start, compiled.rows)) as batches:
            for number, batch in zip(range(start + 1, step + 1), batches):
                if number == step:  # The step below takes the state's memory.
                    losses_BT = _token_losses(setup, state.params, batch)
                state, metrics = compiled.step(state, batch)
                replayed.append(_compared(number, jax.device_get(metrics), recorded.get(number, {})))
                log("step {step}: loss {loss}, recorded {recorded_loss}".format(**replayed[-1]))
    columns = {name: np.asarray(column).reshape(e.batch_rows, -1) for name, column in batch.items()}
    return {
        "run": str(run),
        "step": step,
        "from": start,
        "replayed": replayed,
        "equal": all(record["equal"] for record in replayed),
        "loss": replayed[-1]["loss"],
        "changed": changed(facts.get("environment"), environment(setup)),
        "documents": documents(columns, losses_BT, tokenizer),
    }


def changed(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """The facts of the environment `then` that are others `now`, each with both values; None without `then`."""
    if then is None:
        return None
    return {
        name: [then[name], now.get(name)] for name in then if _without_ones(then[name]) != _without_ones(now.get(name))
    }


def _without_ones(fact: Any) -> Any:
    """The fact, or if it is a mesh, its axes of several devices: earlier versions may lack an axis of size 1."""
    return {axis: size for axis, size in fact.items() if size != 1} if isinstance(fact, dict) else fact


def _experiment(run: Path) -> Experiment:
    """The experiment of a stage directory, which may have been moved; the cache may have stayed where it was."""
    e: Experiment = checkpoint.read_experiment(run, Experiment)
    if not issubclass(STAGES[e.stage].load(), FromText):
        raise UserError(f"{run} has no rows to look at: its batches were sampled. Name a pretraining or SFT stage")
    before, place = e.cache_directory, run.absolute().parent
    here = dataclasses.replace(e, directory=str(place.parent), name=place.name)
    if not (here.cache_directory / "rows").is_dir() and (before / "rows").is_dir():
        here = dataclasses.replace(here, data=dataclasses.replace(e.data, cache=str(before)))
    return here


def _setup(e: Experiment, facts: Mapping[str, Any], log: Log) -> Setup:
    """The setup of a run on the mesh that a checkpoint's facts name, if the devices are enough for it."""
    mesh = facts.get("environment", {}).get("mesh", {})
    recorded = dataclasses.replace(e, mesh=dataclasses.replace(e.mesh, **mesh))
    prepare_backend(recorded)
    return make_setup(recorded if math.prod(mesh.values()) <= jax.device_count() else e, log)


def _compared(number: int, metrics: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A step's loss and gradient norm beside the recorded ones; numbers that are not finite are recorded as None."""
    names = ("loss", "grad_norm")
    now = {name: metrics[name].item() for name in names}
    then = {f"recorded_{name}": recorded.get(name) for name in names}
    equal = bool(recorded) and all((now[n] if math.isfinite(now[n]) else None) == recorded.get(n) for n in names)
    return {"step": number, **now, **then, "equal": equal}


def _token_losses(setup: Setup, params: Params, batch: Mapping[str, jax.Array]) -> np.ndarray:
    """The loss of every target of a batch in nats, (rows, T), by micro-batch as in training."""
    transformer = dataclasses.replace(setup.transformer, matmul=setup.experiment.matmul)
    vocab, softcap = transformer.config.vocab, transformer.config.softcap

    def of(columns: Mapping[str, jax.Array]) -> jax.Array:
        hidden_BTM = transformer.apply(params, columns["tokens"], segments_BT=columns["segments"]).hidden
        head_MV = transformer.head(params)
        return -token_logprobs(hidden_BTM, head_MV, columns["targets"], vocab=vocab, softcap=softcap)

    losses = jax.jit(lambda batch: jax.lax.map(of, batch))(dict(batch))
    return np.asarray(losses).reshape(-1, losses.shape[-1])


def documents(columns: Mapping[str, np.ndarray], losses_BT: np.ndarray, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Every document (or conversation, or part of one) of a batch, the one with the largest share of the loss first.

    `columns` are those of `data.batch`, (rows, T). A document's loss is the mean over its targets, its share that of
    the batch's summed loss. `losses` has an entry per token: None for the first one and for those that are not targets.
    """
    weighted_BT = losses_BT * columns["weights"]
    total = float(np.sum(weighted_BT, dtype=np.float64))
    found = []
    for row, segments_T in enumerate(columns["segments"]):
        borders = [0, *(np.flatnonzero(np.diff(segments_T)) + 1).tolist(), len(segments_T)]
        for start, stop in itertools.pairwise(borders):
            at = slice(start, stop)
            weights, losses = columns["weights"][row, at], losses_BT[row, at]
            targets = int(np.count_nonzero(weights))
            if not targets and (columns["tokens"][row, at] == tokenizer.bos).all():
                continue  # Padding.
            ids = [columns["tokens"][row, start], *columns["targets"][row, at]]
            own = [None, *(float(loss) if weight else None for loss, weight in zip(losses, weights))]
            if not weights[-1]:  # The last target belongs to the next document.
                ids, own = ids[:-1], own[:-1]
            summed = float(np.sum(weighted_BT[row, at], dtype=np.float64))
            document: dict[str, Any] = {"row": row, "start": start, "tokens": len(ids), "targets": targets}
            document |= {"loss": summed / targets if targets else None, "share": summed / total if total else 0.0}
            document["text"] = tokenizer.decode(ids, keep_specials=True)
            names = [name_of(tokenizer, int(i)) for i in ids]
            found.append(document | {"ids": [int(i) for i in ids], "names": names, "losses": own})
    return sorted(found, key=lambda document: -document["share"])
