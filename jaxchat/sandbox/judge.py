"""The judge: runs a test whose text is trusted, with a stand-in for the function under test.

The stand-in sends literals and gets literals, so whatever the program does to its own process, all that it can do to
the judge is to answer with other values than it should.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

from jaxchat.sandbox import walls
from jaxchat.sandbox.inside import die_with_parent, lower
from jaxchat.sandbox.literals import NotLiteral, decode, encode, receive, send

_OWN_SECONDS, _OWN_BYTES = 30, 4 << 30  # of processor time beyond what the program has, and of memory
_PATIENCE_SECONDS = 60  # for a wall to be built


class _Ended(BaseException):
    """The program is of no more use: it is gone, late, or talks nonsense. No test catches this."""


class _Raised(Exception):
    """The function raised, or gave what is no literal."""


class _Broken(Exception):
    """The program could not be started, through no fault of its own."""


def main() -> None:
    """Reads jobs from standard input, and writes verdicts to standard output, which no test can reach.

    Each job has a process of its own: a copy of this one, which saves the start of a Python.
    """
    jobs, verdicts = os.dup(0), os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(silence, number)
    _die_with_parent()
    with contextlib.suppress(EOFError):
        while True:
            job = receive(jobs, 1 << 30)
            ours, its = os.pipe()
            number = os.fork()
            if number == 0:
                _work(job, its)
            os.close(its)
            with open(ours, "rb") as pipe:
                verdict = pipe.read()
            status = os.waitpid(number, 0)[1]
            # Its own limits, or a value that its Python cannot stand: the program made it.
            send(verdicts, json.loads(verdict) if verdict else ["wrong", f"the judge ended with status {status}"])


def _work(job: Mapping[str, Any], verdicts: int) -> NoReturn:
    try:
        _die_with_parent()
        for kind, limit in (
            (resource.RLIMIT_CPU, job["limits"]["cpu_seconds"] + _OWN_SECONDS),
            (resource.RLIMIT_AS, max(_OWN_BYTES, 2 * job["limits"]["memory_bytes"])),
            (resource.RLIMIT_NOFILE, max(64, job["limits"]["open_files"])),
            (resource.RLIMIT_CORE, 0),
        ):
            lower(kind, limit)
        verdict, reason = _judge(job)
        os.write(verdicts, json.dumps([verdict, reason[:2000]]).encode())
    finally:
        os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        die_with_parent()


def _judge(job: Mapping[str, Any]) -> tuple[str, str]:
    """ "right", "wrong", or "broken" where it cannot be told, and why."""
    try:
        with _program(job) as calls:
            stand_in = StandIn(*calls, job["limits"]["message_bytes"])
            _run_test(job, stand_in)
            return ("right", "") if stand_in.calls else ("broken", "the test called nothing")
    except _Broken as error:
        return "broken", str(error)
    except (_Ended, Exception) as error:
        return "wrong", f"{type(error).__name__.strip('_')}: {error}"


@contextlib.contextmanager
def _program(job: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The program, running and waiting for calls: the pipes to it and from it. Afterwards nothing of it is left."""
    wall, user = job["wall"], walls.spare_user()
    user = user if job["another_user"] else None
    with _alarm(_PATIENCE_SECONDS, _Broken(f"no process behind {wall} within {_PATIENCE_SECONDS} s")):
        try:
            process = walls.start(
                wall, user=user, directory=job["directory"], directory_bytes=job["limits"]["directory_bytes"]
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise _Broken(f"{wall}: {error}") from None
    assert process.stdin is not None and process.stdout is not None
    calls, answers = process.stdin.fileno(), process.stdout.fileno()
    try:
        with _alarm(_PATIENCE_SECONDS, _Broken(f"no Python behind {wall} within {_PATIENCE_SECONDS} s")):
            try:
                order = {"user": user, "files": walls.files(wall, job["directory"])}
                send(calls, {**job["limits"], **order, "program": job["program"], "entry_point": job["entry"]})
                if receive(answers, 100) != "ready":
                    raise NotLiteral("another first word")
            except (OSError, EOFError, NotLiteral) as error:
                raise _Broken(f"{wall}: the process did not get ready ({error})") from None
        with _alarm(job["limits"]["wall_seconds"], _Ended("too late")):
            yield calls, answers
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its group, and waits until nothing holds its pipe."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    assert process.stdout is not None
    while os.read(process.stdout.fileno(), 1 << 16):
        pass


@contextlib.contextmanager
def _alarm(seconds: float, what: BaseException) -> Iterator[None]:
    """Raises `what` when the time is over, wherever this process is."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise what

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class StandIn:
    """Called as the function under test would be; asks the program."""

    def __init__(self, calls: int, answers: int, message_bytes: int) -> None:
        self.calls, self._to, self._from, self._limit = 0, calls, answers, message_bytes

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            call = [encode(list(arguments)), encode(keywords)]
        except NotLiteral as error:
            raise _Ended(f"the test passes what is no literal: {error}") from None
        try:
            send(self._to, [self.calls + 1, *call])
            match receive(self._from, self._limit):
                case [int(number), "value", value] if number == self.calls + 1:
                    self.calls += 1
                    return decode(value)
                case [int(_), "error", str(what)]:
                    raise _Raised(what)
                case other:
                    raise _Ended(f"no answer to call {self.calls + 1}: {str(other)[:80]}")
        except (OSError, EOFError, NotLiteral) as error:
            raise _Ended(f"no value: {error}") from None


def _run_test(job: Mapping[str, Any], stand_in: Callable[..., Any]) -> None:
    """Runs check(candidate). The prompt's own helpers are there for it, and the function's name is the stand-in's."""
    names: dict[str, Any] = {"__name__": "test"}
    for text in (job["prompt"], job["prompt"] + "\n    pass\n"):  # A head without a docstring has no body.
        with contextlib.suppress(SyntaxError):
            exec(compile(text, "prompt", "exec"), names)
            break
    names[job["entry"]] = stand_in
    if "random" in job["test"]:
        import random

        random.seed(0)  # Tests that draw their arguments draw the same ones for every answer.
    exec(compile(job["test"], "test", "exec"), names)
    names["check"](stand_in)
