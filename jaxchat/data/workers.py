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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

import jaxchat
from jaxchat import signals
from jaxchat.data.shards import Counts, Recipe, ShardJob, make_shard
from jaxchat.errors import UserError
from jaxchat.machine import cores
from jaxchat.tokenizer import Tokenizer

SMALL = 1 << 20  # bytes on disk; starting processes would take longer than preparing less than this
PRINT_SECONDS = 30.0
SILENT_SECONDS, SLOW_BYTES = 1800.0, 1e5  # A worker reports progress between documents; a document of 1 GB takes long.
Worker = subprocess.Popen[bytes]
Show = Callable[[int, float, int], None]
"""Called with a shard, its finished fraction and the bytes of text read since the last call."""


def run(
    jobs: Sequence[ShardJob], directory: Path, recipe: Recipe, tokenizer: Tokenizer, *, processes: int = 0
) -> dict[int, Counts]:
    """Makes shards in up to `processes` processes (0: one per core); returns the counts by shard number."""
    processes = min(processes or cores(), len(jobs))
    with _progress(jobs) as show:
        if processes <= 1 or sum(job.size for job in jobs) < SMALL:
            return {job.shard: make_shard(job, directory, recipe, tokenizer, partial(show, job.shard)) for job in jobs}
        return _in_processes(jobs, (directory, recipe, tokenizer), show, processes)


@contextlib.contextmanager
def _progress(jobs: Sequence[ShardJob]) -> Iterator[Show]:
    """Context manager: a bar of shards, megabytes of text and time left on stderr, or a line every 30 seconds there."""
    sizes = {job.shard: max(job.size, 1.0) for job in jobs}
    done, read = dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 0)
    printed_at = time.monotonic()
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())  # No bars in a file, even with FORCE_COLOR.
    columns = "preparing", BarColumn(), "{task.percentage:.0f}%, {task.fields[text]}", TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=sum(sizes.values()), text="")

        def show(shard: int, share: float, read_bytes: int) -> None:
            nonlocal printed_at
            signals.check()
            done[shard] = share
            read[shard] += read_bytes
            completed = sum(size * done[shard] for shard, size in sizes.items())
            finished = sum(share == 1.0 for share in done.values())
            text = f"{finished}/{len(sizes)} shards, {sum(read.values()) / 1e6:,.0f} MB"
            progress.update(task, completed=completed, text=text)
            if not console.is_terminal and time.monotonic() - printed_at > PRINT_SECONDS:
                printed_at = time.monotonic()
                print(f"preparing: {completed / sum(sizes.values()):.0%}, {text}", file=sys.stderr, flush=True)

        yield show


def _in_processes(jobs: Sequence[ShardJob], task: Any, show: Show, processes: int) -> dict[int, Counts]:
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
            counts[job.shard] = _receive(worker, job, show)

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
                    worker.kill()
                    assert worker.stdin is not None
                    with contextlib.suppress(BrokenPipeError):  # of a message that a dead worker did not read
                        worker.stdin.close()
    return counts


def _send(worker: Worker, message: Any) -> None:
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # `_receive` reports a worker that ended.
        pickle.dump(message, worker.stdin)
        worker.stdin.flush()


def _receive(worker: Worker, job: ShardJob, show: Show) -> Counts:
    """Shows the progress of a job until the worker sends its counts. One that says nothing for too long is killed."""
    seconds, hangs = SILENT_SECONDS + job.size / SLOW_BYTES, threading.Event()
    try:
        while isinstance(answer := _load(worker, seconds, hangs), tuple):
            show(job.shard, *answer)
    except EOFError:
        status, where = worker.wait(), f"while preparing {job.parts[0][0].path};"
        if hangs.is_set():
            advice = "see whether its disk answers, and start again: finished shards are kept"
            raise UserError(f"a worker did nothing for {seconds:.0f} s {where} {advice}") from None
        reason = f"signal {-status} (perhaps out of memory)" if status < 0 else f"status {status}"
        advice = "start again, with fewer --data.workers if memory is short: finished shards are kept"
        raise UserError(f"a worker ended with {reason} {where} {advice}") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def _load(worker: Worker, seconds: float, hangs: threading.Event) -> Any:
    """The next message of a worker. After so many seconds it is killed and `hangs` is set."""
    assert worker.stdout is not None

    def end() -> None:
        hangs.set()
        worker.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        return pickle.load(worker.stdout)
    finally:
        timer.cancel()


def work() -> None:
    """Runs a worker process: reads its task and then jobs from stdin; answers with progress, counts or an error."""
    for number in signals.STOPPING:  # A signal to the whole group is the parent's to answer; it kills this process.
        signal.signal(number, signal.SIG_IGN)
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
