"""Whether a program passes a test, with limits, and what protects this machine from it meanwhile."""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from jaxchat.errors import UserError
from jaxchat.machine import cores
from jaxchat.sandbox import walls
from jaxchat.sandbox.literals import receive, send
from jaxchat.sandbox.walls import WALLS, Wall

_GRACE_SECONDS = 180  # for starting, ending, and a machine with much else to do


@dataclass(frozen=True)
class Limits:
    """What a program may use for one test.

    Attributes:
        cpu_seconds: processor time, the strict limit: it does not depend on what else the machine does.
        wall_seconds: time on the clock, for programs that wait.
        memory_bytes: address space, Python's own 20 MB included.
        directory_bytes: all files together, where the directory lies in memory.
        message_bytes: the largest answer to one call, as JSON.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 60.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 1 << 20
    directory_bytes: int = 16 << 20
    open_files: int = 32
    message_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise UserError(f"{name}={value}: a program needs more than nothing")


class Job(NamedTuple):
    """A program, the name of the function under test, the text of a test `check(candidate)`, and that before it."""

    program: str
    entry: str
    test: str
    prompt: str = ""


class Verdict(NamedTuple):
    verdict: Literal["right", "wrong", "broken"]
    reason: str


class Protection(NamedTuple):
    """What a program is started behind, found by trying: `sentence` says it, `holes` what is not held."""

    wall: Wall
    another_user: bool
    filter: bool
    holes: tuple[str, ...]

    @property
    def sentence(self) -> str:
        kinds = {
            "bubblewrap": "bubblewrap: no file but Python's, read-only, no other process, no network",
            "namespaces": "own namespaces: no file but Python's, read-only, no other process, no network",
            "limits": "limits of the process (neither bubblewrap nor namespaces work here)",
        }
        parts = [kinds[self.wall]]
        parts += ["a user of its own"] if self.another_user else []
        parts += ["system calls filtered"] if self.filter else []
        parts += ["files held by Landlock"] if self.wall == "limits" and not set(_FILES) & set(self.holes) else []
        warning = f"; NOT held: a program can {', '.join(self.holes)}" if self.holes else ""
        return f"answers run behind {', '.join(parts)}{warning}"


class SandboxError(RuntimeError):
    """A program could not be judged, through no fault of its own."""


def judge(job: Job, limits: Limits = Limits(), protection: Protection | None = None) -> Verdict:
    """Runs a program against a test. "broken" says that the sandbox failed, or the test itself."""
    return judge_many([job], limits, protection=protection)[0]


def judge_many(
    jobs: Sequence[Job], limits: Limits = Limits(), *, workers: int = 0, protection: Protection | None = None
) -> list[Verdict]:
    """Verdicts in the order of the jobs, several at once: as many as there are cores, by default."""
    shield = protection or find_protection()
    waiting, verdicts = deque(enumerate(jobs)), dict[int, Verdict]()

    def work() -> None:
        with _Judge(limits, shield) as judge, contextlib.suppress(IndexError):
            while True:
                number, job = waiting.popleft()
                verdicts[number] = judge.ask(job)

    count = max(1, min(workers or cores(), len(jobs)))
    with ThreadPoolExecutor(count) as pool:
        try:
            for worker in [pool.submit(work) for _ in range(count)]:
                worker.result()
        finally:
            waiting.clear()
    return [verdicts[i] for i in range(len(jobs))]


class _Judge:
    """A process of judge.py, asked by one thread; started again where it gave no answer."""

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
        """The verdict on one program."""
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
        orders, answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        seconds = self._limits.wall_seconds + _GRACE_SECONDS
        with _directory(self._protection.wall) as directory:
            order = {
                **job._asdict(),
                "limits": asdict(self._limits),
                "wall": self._protection.wall,
                "another_user": self._protection.another_user,
                "directory": directory,
            }
            try:
                send(orders, order)
                if select.select([answers], [], [], seconds)[0]:
                    return Verdict(*receive(answers, 1 << 20))
                reason = f"no verdict within {seconds:g} s"
            except (OSError, EOFError):
                reason = "the judge ended"
            self.__exit__()
            return Verdict("broken", reason)


@contextlib.contextmanager
def _directory(wall: Wall) -> Iterator[str]:
    """An empty directory, removed afterwards; behind a wall there is one in memory."""
    if wall != "limits":
        yield "/"
        return
    place = tempfile.mkdtemp(prefix="jaxchat-")
    own = f"{place}/own"
    os.mkdir(own, 0o700)
    os.chmod(place, 0o711)
    try:
        yield own
    finally:
        walls.remove(place)


_FILES = ("read files", "write files")
_PROBE = """
import ctypes, hashlib, math, os, re, socket, typing
def facts(path, port):
    def able(act):
        try:
            act()
        except BaseException:
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
    """The best protection that works here, found once by starting a program that tries what it must not be able to.

    Raises:
        UserError: not even limits work, as on Windows.
    """
    reasons, found = [], []
    for wall in WALLS:
        for another_user in (True, False) if os.getuid() == 0 else (False,):
            protection = _probe(Protection(wall, another_user, False, ()))
            if isinstance(protection, str):
                reasons.append(protection)
            elif not protection.holes:
                return protection
            else:
                found.append(protection)
    if not found:
        raise UserError(f"programs cannot be judged here: {'; '.join(dict.fromkeys(reasons))}")
    return min(found, key=lambda protection: len(protection.holes))


def _probe(protection: Protection) -> Protection | str:
    """What a protection truly holds, or why it does not work here."""
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
