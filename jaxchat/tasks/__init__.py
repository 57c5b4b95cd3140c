"""Tasks whose answers can be checked, by name: what RL learns from and evaluation counts."""

import difflib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxchat.errors import UserError, first_line
from jaxchat.tasks.gsm8k import GSM8K
from jaxchat.tasks.humaneval import HumanEval
from jaxchat.tasks.task import Problem, Score, Split, Task
from jaxchat.tasks.village import Arithmetic, Facts, Spelling

__all__ = ["TASKS", "Problem", "Score", "Task", "load_task", "problems_of"]

TASKS: Mapping[str, Callable[..., Task]] = {
    "arithmetic": Arithmetic,
    "facts": Facts,
    "gsm8k": GSM8K,
    "humaneval": HumanEval,
    "spelling": Spelling,
}
_WITH_FILES = ("gsm8k", "humaneval")


def load_task(spec: str, downloads: Path | None = None) -> Task:
    """The task of a spec: a name of TASKS, or FILE.py:CLASS of one's own.

    gsm8k:DIRECTORY and humaneval:DIRECTORY name their files; those that are not named are the hub's, in `downloads`.
    """
    name, _, rest = spec.rpartition(":") if ".py:" in spec else spec.partition(":")
    if name.endswith(".py"):
        return _own(Path(name), rest)
    if name not in TASKS:
        guess = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {guess[0]}?" if guess else f"there are {', '.join(TASKS)}, and FILE.py:CLASS of your own"
        raise UserError(f"there is no task {name!r}: {hint}")
    reads = name in _WITH_FILES
    if rest and not reads:
        raise UserError(f"the task {name} reads no files: write {name} alone, not {spec}")
    return TASKS[name](rest, downloads) if reads else TASKS[name]()


def problems_of(task: Task, split: Split) -> Sequence[Problem]:
    """The problems of one side of a task; raises UserError where there are none, or other things."""
    try:
        problems = task.problems(split)
        wrong = next((problem for problem in problems if not isinstance(problem, Problem)), None)
    except UserError:
        raise
    except Exception as error:  # The user's code may fail in any way.
        raise UserError(f"the task {task.name} cannot give its {split} problems: {first_line(error)}") from error
    if wrong is not None:
        raise UserError(f"the task {task.name} gives {wrong!r:.80} as a {split} problem, and that is no Problem")
    if not problems:
        raise UserError(f"the task {task.name} has no {split} problems: let its problems({split!r}) give some")
    return problems


def _own(path: Path, name: str) -> Task:
    """A class of a file of the user's."""
    if not path.is_file():
        raise UserError(f"there is no file {path} with a task in it")
    if not name:
        raise UserError(f"which task of {path}? name its class: {path}:CLASS")
    spec = importlib.util.spec_from_file_location(f"own_task_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look up the module that they are made in.
    try:
        spec.loader.exec_module(module)
        task: Task = getattr(module, name)()
    except Exception as error:  # The user's code may fail in any way.
        raise UserError(f"the task {path}:{name} cannot be made: {first_line(error)}") from error
    if missing := [part for part in ("name", "tools", "problems", "score") if not hasattr(task, part)]:
        raise UserError(f"the task {path}:{name} has no {missing[0]}: see jaxchat/tasks/task.py for what it needs")
    return task
