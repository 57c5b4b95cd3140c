"""Makes shards in worker processes, with a progress bar; run as a module, it is the worker process.

Workers are new interpreters that exchange pickled messages with this process. They are not forked, because JAX has
threads here, and do not import the caller's main module, which would start JAX in each worker.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import jaxchat
from jaxchat.data.shards import Counts, Job, Recipe, make_shard
from jaxchat.errors import UserError
from jaxchat.machine import cores
from jaxchat.tokenizer import Tokenizer

SMALL = 1 << 20  # bytes on disk; starting processes would take longer than preparing less than this
PRINT_SECONDS = 30.0
Worker = subprocess.Popen[bytes]


def run(
    jobs: Sequence[Job], directory: Path, recipe: Recipe, tokenizer: Tokenizer, *, processes: int = 0
) -> dict[int, Counts]:
    """Makes shards in up to `processes` processes (0: one per core); returns the counts by shard number."""
    processes = min(processes or cores(), len(jobs))
    with _Bar(jobs) as bar:
        if processes <= 1 or sum(job.size for job in jobs) < SMALL:
            return {
                job.shard: make_shard(job, directory, recipe, tokenizer, partial(bar.show, job.shard)) for job in jobs
            }
        return _in_processes(jobs, (directory, recipe, tokenizer), bar, processes)


class _Bar:
    """Progress on stderr: shards, megabytes of text, time left; a line every 30 seconds if it is not a terminal."""

    def __init__(self, jobs: Sequence[Job]):
        self._sizes = {job.shard: max(job.size, 1.0) for job in jobs}
        self._done = dict.fromkeys(self._sizes, 0.0)
        self._read = dict.fromkeys(self._sizes, 0)
        self._printed_at = time.monotonic()
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("preparing"),
            BarColumn(),
            TextColumn("{task.percentage:.0f}%, {task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=sum(self._sizes.values()), text="")

    def show(self, shard: int, done: float, read: int) -> None:
        self._done[shard] = done
        self._read[shard] += read
        completed = sum(size * self._done[shard] for shard, size in self._sizes.items())
        shards = sum(part == 1.0 for part in self._done.values())
        text = f"{shards}/{len(self._sizes)} shards, {sum(self._read.values()) / 1e6:,.0f} MB"
        self._progress.update(self._task, completed=completed, text=text)
        if not self._console.is_terminal and time.monotonic() - self._printed_at > PRINT_SECONDS:
            self._printed_at = time.monotonic()
            print(f"preparing: {completed / sum(self._sizes.values()):.0%}, {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _in_processes(jobs: Sequence[Job], task: Any, bar: _Bar, processes: int) -> dict[int, Counts]:
    """Makes shards in new processes, each driven by a thread; the first error ends all of them."""
    waiting = sorted(jobs, key=lambda job: job.size)  # The largest is made first, so that none is left for the end.
    path = os.pathsep.join(filter(None, [str(Path(jaxchat.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    counts: dict[int, Counts] = {}

    def drive(worker: Worker) -> None:
        _send(worker, task)
        while True:
            try:
                job = waiting.pop()
            except IndexError:
                return
            _send(worker, job)
            counts[job.shard] = _receive(worker, job, bar)

    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "jaxchat.data.workers"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | {"PYTHONPATH": path},
                )
            )
            for _ in range(processes)
        ]
        with ThreadPoolExecutor(processes) as pool:
            try:
                for done in as_completed([pool.submit(drive, worker) for worker in workers]):
                    done.result()
            finally:
                for worker in workers:
                    worker.terminate()
                    assert worker.stdin is not None
                    with contextlib.suppress(BrokenPipeError):  # of a message that a dead worker did not read
                        worker.stdin.close()
    return counts


def _send(worker: Worker, message: Any) -> None:
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # `_receive` reports a worker that ended.
        pickle.dump(message, worker.stdin)
        worker.stdin.flush()


def _receive(worker: Worker, job: Job, bar: _Bar) -> Counts:
    """Shows the progress of a job until the worker sends its counts."""
    assert worker.stdout is not None
    try:
        while isinstance(answer := pickle.load(worker.stdout), tuple):
            bar.show(job.shard, *answer)
    except EOFError:
        status = worker.wait()
        reason = f"signal {-status} (perhaps out of memory)" if status < 0 else f"status {status}"
        raise UserError(
            f"a worker ended with {reason} while preparing {job.parts[0][0].path}; "
            "start again, with fewer --data.workers if memory is short: finished shards are kept"
        ) from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def work() -> None:
    """Runs a worker process: reads its task and then jobs from stdin; answers with progress, counts or an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent terminates this process
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr

    def answer(message: Any) -> None:
        try:
            pickle.dump(message, answers)
            answers.flush()
        except BrokenPipeError:
            os._exit(1)  # the parent is gone

    directory, recipe, tokenizer = pickle.load(sys.stdin.buffer)
    with contextlib.suppress(EOFError):
        while job := pickle.load(sys.stdin.buffer):
            try:
                answer(make_shard(job, directory, recipe, tokenizer, lambda *progress: answer(progress)))
            except UserError as error:
                answer(error)


if __name__ == "__main__":
    work()
