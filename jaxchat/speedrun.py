"""The full pipeline: runs every stage of a configuration in order and writes a report."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxchat import checkpoint, processes, signals, stages
from jaxchat.data.cache import Log, read_json, write_json
from jaxchat.evaluation import report
from jaxchat.experiment import RESUMABLE, Experiment
from jaxchat.loading import load_checkpoint
from jaxchat.serialization import json_line
from jaxchat.stages import starts
from jaxchat.stages.scores import TaskScores
from jaxchat.stages.stage import inherited

PROGRESS = "speedrun.json"


def run(pipeline: Sequence[Experiment], log: Log, *, dollars_per_hour: float | None = None) -> dict[str, Any]:
    """Runs every unfinished stage, scores the base model on the last stage's tasks, and writes report.md.

    speedrun.json keeps the finished stages; the seconds of a stage are those of its starts.json.

    Raises:
        UserError: a stage cannot be run, or the directory of a finished stage belongs to another experiment.
    """
    place, extended = pipeline[0].run_directory, ""
    log = log if jax.process_index() == 0 else lambda _: None
    for number, e in enumerate(pipeline, 1):
        progress = _shared_progress(place)
        known = progress.get(e.stage, {})
        wanted = e.steps or known.get("result", {}).get("step")
        newest = checkpoint.finished_steps(e.stage_directory)[-1:]
        if extended and newest:
            log(f"warning: {e.stage_directory} started from an earlier {extended}: remove it to train it again")
        if known.get("finished") and newest == [wanted]:
            checkpoint.check_same(e.stage_directory, inherited(e)[0], RESUMABLE)
            log(f"== {e.stage} ({number} of {len(pipeline)}) is finished")
            continue
        log(f"== {e.stage} ({number} of {len(pipeline)})")
        result = stages.run(e)
        _note(place, e.stage, {"finished": True, "result": result, "base": None})
        if any(processes.gather(bool(signals.received()))):  # It came after the last step.
            raise signals.Interrupted(f"{e.stage} is finished")
        extended = e.stage if known.get("finished") else extended
    if _shared_progress(place)[pipeline[0].stage].get("base") is None:
        began = time.monotonic()
        base = score_base(pipeline[0], pipeline[-1], log)
        _note(place, pipeline[0].stage, {"base": base, "base_seconds": round(time.monotonic() - began, 1)})
    progress = _shared_progress(place)
    if jax.process_index():
        return {}
    known = {e.stage: progress[e.stage] | {"starts": starts.read(e.stage_directory)} for e in pipeline}
    path = report.write(place, known, log=log, dollars_per_hour=dollars_per_hour)
    seconds = {stage: round(sum(start["seconds"] for start in own["starts"]), 1) for stage, own in known.items()}
    return {**{stage: known[stage]["result"] | {"seconds": seconds[stage]} for stage in known}, "report": str(path)}


def score_base(e: Experiment, last: Experiment, log: Log) -> dict[str, float]:
    """Scores the base model on the tasks of the last stage, with plain-text prompts."""
    base = load_checkpoint(str(e.stage_directory))
    score = TaskScores(last, base.tokenizer, log, style="text")
    score.begin(base.transformer())
    scores = score(base.params())
    log(f"base model, with plain-text prompts: {json_line(scores)}")
    return scores


def _note(place: Path, part: str, facts: Mapping[str, Any]) -> None:
    """Updates entries of a part in speedrun.json."""
    if jax.process_index() == 0:
        progress = _read(place)
        write_json(place / PROGRESS, progress | {part: progress.get(part, {}) | dict(facts)})


def _shared_progress(place: Path) -> dict[str, Any]:
    """speedrun.json as the first process reads it, the same in all processes."""
    return processes.gather(_read(place))[0]


def _read(place: Path) -> dict[str, Any]:
    """The content of speedrun.json; empty if it is missing or damaged."""
    progress = read_json(place / PROGRESS)
    return progress if isinstance(progress, dict) else {}
