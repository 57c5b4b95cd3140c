"""What SFT and RL are scored on beside their own loss: pretraining text that may be forgotten, and problems."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxchat import checkpoint
from jaxchat.compilation import Setup
from jaxchat.config import UserError
from jaxchat.data import prepare
from jaxchat.decode.engine import Engine, Shape
from jaxchat.decode.sampling import SamplingParams
from jaxchat.evaluation.bits_per_byte import BitsPerByte
from jaxchat.evaluation.solve import Style, solve
from jaxchat.experiment import STAGES, Experiment
from jaxchat.model.transformer import Params
from jaxchat.stages.stage import Say
from jaxchat.tasks import Task, load_task, problems_of
from jaxchat.tokenizer import Tokenizer

EVALUATION_SEED = 1_000_003  # Its noise is the same at every step, and not that of any rollout.


def pretrained_text(setup: Setup, tokenizer: Tokenizer, micro_rows: int, say: Say) -> BitsPerByte | None:
    """Bits per byte on the held-out text of the pretraining that this stage goes back to, where that is at hand."""
    e = setup.experiment
    directory = Path(e.start.partition("@")[0])
    try:
        base = checkpoint.read_experiment(directory, Experiment)
        while base.stage != "pretrain":
            name = base.start_from.partition("@")[0]
            directory = directory.parent / name if name in STAGES else Path(name)
            base = checkpoint.read_experiment(directory, Experiment)
        rows = prepare.ensure_rows(base.data, tokenizer, "val", e.cache_directory, log=say)
    except UserError as error:
        say(f"warning: what is forgotten of the pretraining text is not measured: {error}")
        return None
    return BitsPerByte(
        setup.transformer, setup.mesh, rows=rows, bytes_per_token=tokenizer.bytes_per_token, batch_rows=micro_rows
    )


class TaskScores:
    """The share of test problems that are solved: the same problems with the same noise at every step."""

    def __init__(self, setup: Setup, tokenizer: Tokenizer, say: Say) -> None:
        e = setup.experiment
        self._setup, self._tokenizer, self._say = setup, tokenizer, say
        self._tasks = [load_task(spec, e.cache_directory / "downloads") for spec in e.tasks]
        self._engine: Engine | None = None

    def __call__(self, params: Params) -> dict[str, Any]:
        e = self._setup.experiment
        if self._engine is None:
            shape = Shape(length=e.data.row_length, slots=64, prompts=8)
            self._engine = Engine(self._setup.transformer, params, self._tokenizer, shape)
        self._engine.load(params)
        return task_scores(self._engine, self._tasks, e, self._say)


def task_scores(
    engine: Engine, tasks: Sequence[Task], e: Experiment, say: Say, *, style: Style = "chat"
) -> dict[str, float]:
    """Shares of an experiment's test problems that are solved, and pass@k, each judged strictly and leniently."""
    found: dict[str, float] = {}
    for task in tasks:
        problems = problems_of(task, "test")[: e.eval_problems]
        sampling = SamplingParams(1.0, max_tokens=e.eval_tokens, seed=EVALUATION_SEED)
        solved = solve(engine, task, problems, n=e.eval_samples, sampling=sampling, style=style, log=say)
        for k, (strict, lenient) in solved.pass_at.items():
            at = f"_pass@{k}" if k > 1 else ""
            found |= {f"{task.name}_strict{at}": strict, f"{task.name}_lenient{at}": lenient}
    return found
