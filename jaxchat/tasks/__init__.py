"""Tasks with verifiable answers, by name, for reinforcement learning and evaluation."""

import difflib
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Mapping
from inspect import ismodule
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError, first_line
from jaxchat.paths import user_path
from jaxchat.tasks.files import FromFiles
from jaxchat.tasks.gsm8k import GSM8K
from jaxchat.tasks.humaneval import HumanEval
from jaxchat.tasks.limit import take
from jaxchat.tasks.task import Problem, Score, Split, Task
from jaxchat.tasks.village import Arithmetic, Facts, Spelling

__all__ = ["TASKS", "Problem", "Score", "Task", "code_of", "load_task", "problems_of"]

TASKS: Mapping[str, type[Any]] = {
    "arithmetic": Arithmetic,
    "facts": Facts,
    "gsm8k": GSM8K,
    "humaneval": HumanEval,
    "spelling": Spelling,
}


def load_task(spec: str, downloads: Path | None = None) -> Task:
    """Loads a task: a name in TASKS, or FILE.py:CLASS for the user's own.

    A task that reads files takes a directory and `downloads`: gsm8k:DIRECTORY reads local files, gsm8k is downloaded
    from the hub to `downloads`. Raises `UserError` if the task is unknown or cannot be loaded.
    """
    name, _, rest = spec.rpartition(":") if ".py:" in spec else spec.partition(":")
    if name.endswith(".py"):
        return _load_own(user_path(name), rest)
    if name not in TASKS:
        guess = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {guess[0]}?" if guess else f"choose one of {', '.join(TASKS)}, or FILE.py:CLASS"
        raise UserError(f"unknown task {name!r}: {hint}")
    has_files = issubclass(TASKS[name], FromFiles)
    if rest and not has_files:
        raise UserError(f"the task {name} reads no files: write {name} instead of {spec}")
    return TASKS[name](rest, downloads) if has_files else TASKS[name]()


def problems_of(task: Task, split: Split, limit: int | None = None) -> list[Problem]:
    """Returns a split's problems, or a sample of `limit`, stratified by kind; the first if their order is random.

    Raises:
        UserError: there are none, or an element is not a Problem.
    """
    try:
        problems = list(task.problems(split))  # It may be an iterator, which has no length and is read once.
    except UserError:
        raise
    except Exception as error:  # The user's code may fail in any way.
        raise UserError(f"the task {task.name} failed to load its {split} problems: {first_line(error)}") from error
    if wrong := [problem for problem in problems if not isinstance(problem, Problem)]:
        raise UserError(
            f"the task {task.name} returned {wrong[0]!r:.80} among its {split} problems instead of a Problem"
        )
    if not problems:
        raise UserError(f"the task {task.name} has no {split} problems: its problems({split!r}) must return some")
    return problems[:limit] if getattr(task, "shuffled", False) else take(problems, limit, lambda one: one.kind)


def code_of(task: Task) -> str:
    """Hash of what judges a task's answers, code and `judged_by`; empty if the code is in no file, as in a notebook.

    It covers the files of the task's module and of what that imports at its top level, except Python's own modules,
    installed packages and, of jaxchat, all but tasks and sandbox.
    """
    foreign = tuple(map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")))
    pending, seen, files = [type(task).__module__], set[str](), set[Path]()
    while pending:
        name = pending.pop() or ""
        file = getattr(sys.modules.get(name), "__file__", None) or ""
        own = name.startswith(("jaxchat.tasks", "jaxchat.sandbox"))
        if name in seen or not file or (not own and (file.startswith(foreign) or name.startswith("jaxchat."))):
            continue
        seen.add(name)
        files |= set(Path(file).parent.glob("*.py")) if own else {Path(file)}
        values = list(vars(sys.modules[name]).values())
        pending += [value.__name__ if ismodule(value) else getattr(value, "__module__", "") for value in values]
    code = sorted(path.read_bytes() for path in files)
    if code and (other := getattr(task, "judged_by", "")):
        code.append(other.encode())
    return hashlib.blake2b(b"\0".join(code), digest_size=8).hexdigest() if code else ""


def _load_own(path: Path, name: str) -> Task:
    """Instantiates the task class `name` of the user's file `path`."""
    if not path.is_file():
        raise UserError(f"task file {path} does not exist")
    if not name:
        raise UserError(f"no task class given for {path}: write {path}:CLASS")
    spec = importlib.util.spec_from_file_location(f"own_task_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look up the module in which they are defined.
    try:
        spec.loader.exec_module(module)
        task: Task = getattr(module, name)()
    except Exception as error:  # The user's code may fail in any way.
        raise UserError(f"the task {path}:{name} cannot be loaded: {first_line(error)}") from error
    if missing := [part for part in ("name", "tools", "problems", "score") if not hasattr(task, part)]:
        raise UserError(f"the task {path}:{name} has no attribute {missing[0]}: see Task in jaxchat/tasks/task.py")
    for part, example in (("tools", ("calculator",)), ("stop", ("\n\n",))):
        if not isinstance(getattr(task, part, ()), tuple | list):
            raise UserError(f"the task {path}:{name}: {part} must be a tuple or list of texts, such as {example}")
    return task
