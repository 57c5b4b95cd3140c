"""The whole road: every stage of a configuration, one after another, and a report of it."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxchat import checkpoint, processes, signals, stages
from jaxchat.data.cache import write_json
from jaxchat.evaluation import report
from jaxchat.experiment import RESUMABLE, Experiment
from jaxchat.loading import load_checkpoint
from jaxchat.serialization import json_line
from jaxchat.stages.scores import TaskScores
from jaxchat.stages.stage import inherited

PROGRESS = "speedrun.json"
BASE = "scoring the base model"
CLOCK_SECONDS = 5.0  # Seconds of a stage that a kill may leave uncounted.
Log = Callable[[str], None]


def run(
    road: Sequence[Experiment], stopped: Callable[[], bool], log: Log, *, dollars_per_hour: float | None = None
) -> dict[str, Any]:
    """Runs every stage that is not finished, scores the base model on the last stage's problems, writes report.md.

    What is finished, and the seconds that each stage took over all its starts, is kept in speedrun.json.

    Raises:
        UserError: what a stage refuses, a finished one too: its directory may hold another experiment.
    """
    place, went_on = road[0].run_directory, ""
    log = log if jax.process_index() == 0 else lambda _: None
    for number, e in enumerate(road, 1):
        progress = _agreed(place)
        known = progress.get(e.stage, {})
        wanted = e.steps or known.get("result", {}).get("step")
        newest = checkpoint.finished_steps(e.stage_directory)[-1:]
        if went_on and newest:
            log(f"warning: {e.stage_directory} started from {went_on} as it was before: remove it to train it again")
        if known.get("finished") and newest == [wanted]:
            checkpoint.check_same(e.stage_directory, inherited(e)[0], RESUMABLE)
            log(f"== {e.stage} ({number} of {len(road)}) is finished")
            continue
        log(f"== {e.stage} ({number} of {len(road)})")
        with timed(place, e.stage):
            result = stages.run(e, stopped)
        _note(place, e.stage, {"finished": True, "result": result, "base": None})
        if any(processes.gather(stopped())):  # After the last step of a stage, where it had an end to come to.
            raise signals.Interrupted(f"{e.stage} is finished")
        went_on = e.stage if known.get("finished") else went_on
    if not _agreed(place)[road[0].stage].get("base"):
        with timed(place, BASE):
            base = score_base(road[0], road[-1], log)
        _note(place, road[0].stage, {"base": base})
    progress = _agreed(place)
    if jax.process_index():
        return {}
    path = report.write(place, [e.stage for e in road], progress, log=log, dollars_per_hour=dollars_per_hour)
    return {
        **{e.stage: progress[e.stage]["result"] | {"seconds": progress[e.stage]["seconds"]} for e in road},
        "report": str(path),
    }


def score_base(e: Experiment, last: Experiment, log: Log) -> dict[str, float]:
    """The base model on the problems of the last stage, asked in the words of its own text."""
    base = load_checkpoint(str(e.stage_directory))
    score = TaskScores(last, base.transformer(), base.tokenizer, log, style="text")
    found = score(base.params())
    log(f"the base model, asked in text: {json_line(found)}")
    return found


@contextlib.contextmanager
def timed(place: Path, part: str) -> Iterator[None]:
    """Adds the seconds of a block to those of a part in speedrun.json, as they pass, so that a kill loses few.

    Writes nothing before the run directory is there.
    """
    before, start, done = _read(place).get(part, {}).get("seconds", 0.0), time.monotonic(), threading.Event()

    def count() -> None:
        if place.is_dir():
            _note(place, part, {"seconds": round(before + time.monotonic() - start, 1)})

    def beat() -> None:
        while not done.wait(CLOCK_SECONDS):
            count()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        count()


def _note(place: Path, part: str, facts: Mapping[str, Any]) -> None:
    """Changes some facts of a part in speedrun.json."""
    if jax.process_index() == 0:
        progress = _read(place)
        write_json(place / PROGRESS, progress | {part: progress.get(part, {}) | dict(facts)})


def _agreed(place: Path) -> dict[str, Any]:
    """What the first process reads, in all of them."""
    return processes.gather(_read(place))[0]


def _read(place: Path) -> dict[str, Any]:
    """What speedrun.json tells, nothing where there is none."""
    try:
        found: Any = json.loads((place / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}
