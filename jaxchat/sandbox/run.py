"""Judges programs by tests within resource limits, in the best sandbox that works on this machine."""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from jaxchat import signals
from jaxchat.errors import UserError
from jaxchat.machine import cores
from jaxchat.sandbox import walls
from jaxchat.sandbox.literals import receive, send
from jaxchat.sandbox.walls import WALLS, Wall

_GRACE_SECONDS = 180  # Time allowed beyond the wall time limit for start, shutdown and a busy machine.


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program for one test.

    Attributes:
        cpu_seconds: CPU time, the main limit, because it does not depend on the load of the machine.
        wall_seconds: wall time, which limits programs that wait.
        memory_bytes: address space, including about 20 MB for Python itself.
        message_bytes: size of the answer to one call, as JSON.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 60.0
    memory_bytes: int = 512 << 20
    open_files: int = 32
    message_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise UserError(f"{name}={value} must be positive")


class Job(NamedTuple):
    """A program, the name of the function under test, test code that defines `check(candidate)`, and the prompt, whose
    helper functions the test may use."""

    program: str
    entry: str
    test: str
    prompt: str = ""


class Verdict(NamedTuple):
    verdict: Literal["right", "wrong", "broken"]
    reason: str


class Protection(NamedTuple):
    """The sandbox as measured by a probe program; `holes` lists what a program can still do."""

    wall: Wall
    another_user: bool
    filter: bool
    holes: tuple[str, ...]

    @property
    def sentence(self) -> str:
        kinds = {
            "bubblewrap": "bubblewrap (only Python's files, read-only; no other processes; no network)",
            "limits": "process limits (bubblewrap is not installed or does not work here)",
        }
        parts = [kinds[self.wall]]
        parts += ["a separate user"] if self.another_user else []
        parts += ["filtered system calls"] if self.filter else []
        parts += ["files protected by Landlock"] if self.wall == "limits" and not set(_FILES) & set(self.holes) else []
        warning = f"; NOT protected: a program can {', '.join(self.holes)}" if self.holes else ""
        return f"answers run in a sandbox: {', '.join(parts)}{warning}"


class SandboxError(RuntimeError):
    """The sandbox or the test failed, so that a program could not be judged."""


def judge(job: Job, limits: Limits = Limits(), protection: Protection | None = None) -> Verdict:
    """Runs a program against a test. The verdict is "broken" if the sandbox failed or the test called nothing."""
    return judge_many([job], limits, protection=protection)[0]


def judge_many(
    jobs: Sequence[Job], limits: Limits = Limits(), *, workers: int = 0, protection: Protection | None = None
) -> list[Verdict]:
    """Judges jobs in parallel, by default with one worker per core; returns verdicts in the order of the jobs."""
    sandbox = protection or find_protection()
    queue, verdicts = deque(enumerate(jobs)), dict[int, Verdict]()

    def work() -> None:
        with _Judge(limits, sandbox) as judge, contextlib.suppress(IndexError):
            while True:
                signals.check()
                number, job = queue.popleft()
                verdicts[number] = judge.ask(job)

    count = max(1, min(workers or cores(), len(jobs)))
    with ThreadPoolExecutor(count) as pool:
        try:
            for worker in [pool.submit(work) for _ in range(count)]:
                worker.result()
        finally:
            queue.clear()
    return [verdicts[i] for i in range(len(jobs))]


class _Judge:
    """A judge.py process used by one thread; restarted if it fails to answer."""

    def __init__(self, limits: Limits, protection: Protection) -> None:
        self._limits, self._protection = limits, protection
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Judge":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            with self._process:
                self._process = None

    def ask(self, job: Job) -> Verdict:
        """Judges one program; "broken" if the judge process gives no verdict."""
        if self._process is None:
            self._process = subprocess.Popen(
                walls.command("judge:main", str(os.getpid())),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**walls.ENVIRONMENT, "PATH": os.environ.get("PATH", os.defpath)},
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        requests, answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        seconds = self._limits.wall_seconds + _GRACE_SECONDS
        request = {**job._asdict(), "limits": asdict(self._limits), **self._protection._asdict()}
        try:
            send(requests, request)
            if select.select([answers], [], [], seconds)[0]:
                return Verdict(*receive(answers, 1 << 20))
            reason = f"no verdict within {seconds:g} s"
        except (OSError, EOFError):
            reason = "the judge process died"
        self.__exit__()
        return Verdict("broken", reason)


_FILES = ("read files", "write files")
_PROBE = """
import ctypes, hashlib, math, os, re, socket, typing
def facts(path, port):
    def able(act):
        try:
            act()
        except OSError:  # Another failure protects from nothing.
            return False
        return True
    def start():
        if os.fork() == 0:
            os._exit(0)
    return {
        "start processes": able(start),
        "reach the network": able(lambda: socket.create_connection(("127.0.0.1", port), 5)),
        "read files": able(lambda: open(path).read()),
        "write files": able(lambda: open(path, "a").close()),
        "filtered": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == -1,
    }
"""


@functools.cache
def find_protection() -> Protection:
    """Finds the strongest sandbox that works here, by running a probe that tries forbidden actions in each. Cached.

    Raises:
        UserError: no sandbox works.
    """
    if sys.platform != "linux":
        raise UserError(
            "programs are judged in a sandbox of Linux only: leave out the tasks that need it, or use Linux"
        )
    reasons, leaky = [], []
    for wall in WALLS:
        for another_user in (True, False) if os.getuid() == 0 else (False,):
            protection = _probe(Protection(wall, another_user, False, ()))
            if isinstance(protection, str):
                reasons.append(protection)
            elif not protection.holes:
                return protection
            else:
                leaky.append(protection)
    if not leaky:
        raise UserError(f"no sandbox for programs works on this machine: {'; '.join(dict.fromkeys(reasons))}")
    return min(leaky, key=lambda protection: len(protection.holes))


def _probe(protection: Protection) -> Protection | str:
    """Runs the probe; returns the protection with its measured holes, or the reason why it does not work here."""
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(directory, 0o755)
        path = f"{directory}/file"
        with open(path, "w"):
            os.chmod(path, 0o666)
        call = f"candidate({path!r}, {server.getsockname()[1]})"
        test = f"import json\ndef check(candidate): raise OSError(json.dumps({call}))"
        verdict = judge(Job(_PROBE, "facts", test), protection=protection)
    kind, _, text = verdict.reason.partition(": ")
    if kind != "OSError":
        return verdict.reason
    facts = json.loads(text)
    filtered = facts.pop("filtered")
    return protection._replace(filter=filtered, holes=tuple(name for name, able in facts.items() if able))
