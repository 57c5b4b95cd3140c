"""The whole road: every stage of a configuration, one after another, and a report of it."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxchat import checkpoint, stages
from jaxchat.config import json_line
from jaxchat.data.cache import write_json
from jaxchat.decode.engine import load_engine
from jaxchat.decode.sampling import SamplingParams
from jaxchat.evaluation import report
from jaxchat.evaluation.solve import solve
from jaxchat.experiment import Experiment
from jaxchat.stages.scores import EVALUATION_SEED
from jaxchat.tasks import load_task

PROGRESS = "speedrun.json"
Say = Callable[[str], None]


def run(
    road: Sequence[Experiment], stopped: Callable[[], bool], say: Say, *, dollars_per_hour: float | None = None
) -> dict[str, Any]:
    """Runs every stage that is not finished, scores the base model on the last stage's problems, writes report.md.

    What is finished, and the seconds that each stage took over all its starts, is kept in speedrun.json.
    """
    place = road[0].run_directory
    for number, e in enumerate(road, 1):
        progress = _read(place)
        known = progress.get(e.stage, {})
        wanted = e.steps or known.get("result", {}).get("step")
        if known.get("finished") and checkpoint.finished_steps(e.stage_directory)[-1:] == [wanted]:
            say(f"== {e.stage} ({number} of {len(road)}) is finished")
            continue
        say(f"== {e.stage} ({number} of {len(road)})")
        start = time.monotonic()
        try:
            known = {"finished": True, "result": stages.run(e, stopped)}
        finally:
            known["seconds"] = round(progress.get(e.stage, {}).get("seconds", 0.0) + time.monotonic() - start, 1)
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / PROGRESS, progress | {e.stage: known})
    progress = _read(place)
    if "base" not in progress[road[0].stage]:
        progress[road[0].stage]["base"] = score_base(road[0], road[-1], say)
        write_json(place / PROGRESS, progress)
    path = report.write(place, [e.stage for e in road], progress, say=say, dollars_per_hour=dollars_per_hour)
    return {
        **{e.stage: progress[e.stage]["result"] | {"seconds": progress[e.stage]["seconds"]} for e in road},
        "report": str(path),
    }


def score_base(e: Experiment, last: Experiment, say: Say) -> dict[str, float]:
    """The base model on the problems of the last stage, asked in the words of its own text."""
    engine = load_engine(str(e.stage_directory), Experiment, slots=64, prompts=8)
    found: dict[str, float] = {}
    for spec in last.tasks:
        task = load_task(spec, e.cache_directory / "downloads")
        sampling = SamplingParams(1.0, max_tokens=last.eval_tokens, seed=EVALUATION_SEED)
        solved = solve(
            engine, task, task.problems("test")[: last.eval_problems], n=1, sampling=sampling, style="text", log=say
        )
        found |= {f"{task.name}_strict": solved.strict, f"{task.name}_lenient": solved.lenient}
    say(f"the base model, asked in text: {json_line(found)}")
    return found


def _read(place: Path) -> dict[str, Any]:
    """What speedrun.json tells, nothing where there is none."""
    try:
        found: Any = json.loads((place / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}
