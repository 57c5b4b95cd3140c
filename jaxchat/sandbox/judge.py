"""Judge process: runs a trusted test with a proxy for the function under test.

The proxy exchanges only literals with the program's process, so a program that takes over its own process can still do
no more to the judge than return wrong values.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

from jaxchat.sandbox import walls
from jaxchat.sandbox.inside import die_with_parent, lower
from jaxchat.sandbox.literals import NotLiteral, decode, encode, receive, send

_OWN_SECONDS, _OWN_BYTES = 30, 4 << 30  # The judge's CPU time beyond the program's limit, and its memory limit.
_STARTUP_SECONDS = 60  # Time limit for the sandbox to start.


class _Ended(BaseException):
    """The program exited, timed out or broke the protocol. A BaseException, so that tests do not catch it."""


class _Raised(Exception):
    """The function raised an exception, or returned something other than a literal."""


class _Broken(Exception):
    """The sandbox failed to start the program."""


def main() -> None:
    """Reads jobs from standard input and writes verdicts to standard output, both hidden from the tests.

    Each job runs in a fork of this process, which is faster than starting a new Python.
    """
    jobs, verdicts = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    die_with_parent()
    with contextlib.suppress(EOFError):
        while True:
            job = receive(jobs, 1 << 30)
            read_end, write_end = os.pipe()
            number = os.fork()
            if number == 0:
                _work(job, write_end)
            os.close(write_end)
            with open(read_end, "rb") as pipe:
                verdict = pipe.read()
            status = os.waitpid(number, 0)[1]
            # If the fork died of its limits or of a value that it received, that is the program's fault.
            send(verdicts, json.loads(verdict) if verdict else ["wrong", f"the judge ended with status {status}"])


def _work(job: Mapping[str, Any], verdicts: int) -> NoReturn:
    try:
        die_with_parent()
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


def _judge(job: Mapping[str, Any]) -> tuple[str, str]:
    """Returns "right", "wrong" or, if the sandbox or the test failed, "broken", and the reason."""
    try:
        with _program(job) as calls:
            stand_in = StandIn(*calls, job["limits"]["message_bytes"])
            _run_test(job, stand_in)
            return ("right", "") if stand_in.calls else ("broken", "the test did not call the function")
    except _Broken as error:
        return "broken", str(error)
    except (_Ended, Exception) as error:
        return "wrong", f"{type(error).__name__.strip('_')}: {error}"


@contextlib.contextmanager
def _program(job: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Starts the program and yields the pipes to and from it; kills all its processes on exit."""
    wall, user = job["wall"], walls.spare_user()
    user = user if job["another_user"] else None
    with _alarm(_STARTUP_SECONDS, _Broken(f"{wall}: no process started within {_STARTUP_SECONDS} s")):
        try:
            process = walls.start(wall, user)
        except (OSError, subprocess.SubprocessError) as error:
            raise _Broken(f"{wall}: {error}") from None
    assert process.stdin is not None and process.stdout is not None
    calls, answers = process.stdin.fileno(), process.stdout.fileno()
    try:
        with _alarm(_STARTUP_SECONDS, _Broken(f"{wall}: Python did not start within {_STARTUP_SECONDS} s")):
            try:
                setup = {"user": user, "files": walls.files(wall)}
                send(calls, {**job["limits"], **setup, "program": job["program"], "entry_point": job["entry"]})
                if receive(answers, 100) != "ready":
                    raise NotLiteral("unexpected first message")
            except (OSError, EOFError, NotLiteral) as error:
                raise _Broken(f"{wall}: the process did not become ready ({error})") from None
        with _alarm(job["limits"]["wall_seconds"], _Ended("the time limit is exceeded")):
            yield calls, answers
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process and its group, and waits until no process holds its pipe open."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    assert process.stdout is not None
    while os.read(process.stdout.fileno(), 1 << 16):
        pass


@contextlib.contextmanager
def _alarm(seconds: float, error: BaseException) -> Iterator[None]:
    """Raises `error` in this process, by a signal, if the context takes longer than `seconds`."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise error

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class StandIn:
    """Proxy for the function under test: forwards calls to the program's process."""

    def __init__(self, calls: int, answers: int, message_bytes: int) -> None:
        self.calls, self._to, self._from, self._limit = 0, calls, answers, message_bytes

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            call = [encode(list(arguments)), encode(keywords)]
        except NotLiteral as error:
            raise _Ended(f"the test passes something other than literals: {error}") from None
        try:
            with contextlib.suppress(BrokenPipeError):  # The program has ended; its last answer says why.
                send(self._to, [self.calls + 1, *call])
            match receive(self._from, self._limit):
                case [int(number), "value", value] if number == self.calls + 1:
                    self.calls += 1
                    return decode(value)
                case [int(_), "error", str(name)]:
                    raise _Raised(name)
                case other:
                    raise _Ended(f"no answer to call {self.calls + 1}: {str(other)[:80]}")
        except (OSError, EOFError, NotLiteral) as error:
            raise _Ended(f"no value: {error}") from None


def _run_test(job: Mapping[str, Any], stand_in: Callable[..., Any]) -> None:
    """Runs check(candidate) with the proxy; the test can use the helper functions in the prompt."""
    names: dict[str, Any] = {"__name__": "test"}
    for text in (job["prompt"], job["prompt"] + "\n    pass\n"):  # A function without a docstring needs a body.
        with contextlib.suppress(SyntaxError):
            exec(compile(text, "prompt", "exec"), names)
            break
    names[job["entry"]] = stand_in
    if "random" in job["test"]:
        import random

        random.seed(0)  # Tests with random arguments use the same ones for every answer.
    exec(compile(job["test"], "test", "exec"), names)
    names["check"](stand_in)
