"""Makes shards in worker processes, with a progress bar.

Workers are new interpreters that run `jaxchat.data.shards` and exchange lines of JSON with this process. They are not
forked, because JAX has threads here, and do not import the caller's main module, which would start JAX in each worker.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
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
        tokenizer.save(directory / "tokenizer")
        task = {"recipe": asdict(recipe), "directory": str(directory), "tokenizer": str(directory / "tokenizer")}
        return _Pool(processes, task).run(jobs, bar)


class _Bar:
    """Progress on stderr: shards, megabytes of text, time left; a line every 30 seconds if it is not a terminal."""

    def __init__(self, jobs: Sequence[Job]):
        self._sizes = {job.shard: max(job.size, 1.0) for job in jobs}
        self._done = dict.fromkeys(self._sizes, 0.0)
        self._megabytes = 0.0
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
        self._megabytes += read / 1e6
        completed = sum(size * self._done[shard] for shard, size in self._sizes.items())
        shards = sum(part == 1.0 for part in self._done.values())
        text = f"{shards}/{len(self._sizes)} shards, {self._megabytes:,.0f} MB"
        self._progress.update(self._task, completed=completed, text=text)
        if not self._console.is_terminal and time.monotonic() - self._printed_at > PRINT_SECONDS:
            self._printed_at = time.monotonic()
            print(f"preparing: {completed / sum(self._sizes.values()):.0%}, {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class _Pool:
    def __init__(self, processes: int, task: dict[str, Any]):
        path = os.pathsep.join([str(Path(jaxchat.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self._answers: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self._workers = [
            subprocess.Popen(
                [sys.executable, "-m", "jaxchat.data.shards"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
                text=True,
                encoding="utf-8",
            )
            for _ in range(processes)
        ]
        self._listeners = [threading.Thread(target=self._listen, args=(i,), daemon=True) for i in range(processes)]
        for thread in self._listeners:
            thread.start()
        for i in range(processes):
            self._send(i, task)

    def run(self, jobs: Sequence[Job], bar: _Bar) -> dict[int, Counts]:
        # Large shards are made first, so that no worker is busy long after the others.
        waiting = sorted(jobs, key=lambda job: job.size)
        busy: dict[int, Job] = {}
        counts: dict[int, Counts] = {}
        try:
            for i in range(len(self._workers)):
                busy[i] = waiting.pop()
                self._send(i, _message(busy[i]))
            while busy:
                i, answer = self._answers.get()
                if answer is None:
                    if i in busy:
                        raise UserError(self._lost(i, busy[i]))
                elif "error" in answer:
                    raise UserError(answer["error"])
                elif "counts" in answer:
                    counts[answer["shard"]] = Counts(**answer["counts"])
                    del busy[i]
                    if waiting:
                        busy[i] = waiting.pop()
                        self._send(i, _message(busy[i]))
                else:
                    bar.show(answer["shard"], answer["done"], answer["read"])
            return counts
        finally:
            self._close()

    def _send(self, i: int, message: Any) -> None:
        stream = self._workers[i].stdin
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):  # a worker that ended is reported by its listener
            stream.write(json.dumps(message) + "\n")
            stream.flush()

    def _listen(self, i: int) -> None:
        stream = self._workers[i].stdout
        assert stream is not None
        for line in stream:
            self._answers.put((i, json.loads(line)))
        self._answers.put((i, None))

    def _lost(self, i: int, job: Job) -> str:
        status = self._workers[i].wait()
        reason = f"signal {-status} (perhaps out of memory)" if status < 0 else f"status {status}"
        return (
            f"a worker ended with {reason} while preparing {job.parts[0][0].path}; "
            "start again, with fewer --data.workers if memory is short: finished shards are kept"
        )

    def _close(self) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker, thread in zip(self._workers, self._listeners):
            worker.wait()
            thread.join()
            for stream in (worker.stdin, worker.stdout):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _message(job: Job) -> Any:
    return job.shard, [(asdict(source), part, parts) for source, part, parts in job.parts]
