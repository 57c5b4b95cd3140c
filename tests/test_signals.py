"""Signals: acknowledged at once, acted upon at the next check, and never an exception out of a handler."""

import contextlib
import hashlib
import importlib
import itertools
import os
import pydoc
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxchat import devices, launcher, signals
from jaxchat.data import cache
from jaxchat.errors import UserError
from jaxchat.signals import Interrupted

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def as_before():
    before = [signal.getsignal(number) for number in signals.STOPPING]
    yield
    assert [signal.getsignal(number) for number in signals.STOPPING] == before
    assert signals.received() == []


def send(number):
    os.kill(os.getpid(), number)


def send_after(seconds, number):
    thread = threading.Timer(seconds, send, [number])
    thread.start()
    return thread


class Notes:
    """What the thread writes to stderr, with the times, and the statuses with which it ends the process."""

    def __init__(self, monkeypatch):
        self.texts, self.times, self.statuses = [], [], []
        monkeypatch.setattr(signals.os, "write", self._write)
        monkeypatch.setattr(signals.os, "_exit", self.statuses.append)

    def _write(self, fd, data):
        self.texts.append(data.decode())
        self.times.append(time.monotonic())
        return len(data)

    def wait(self, count=1):
        end = time.monotonic() + 5
        while len(self.texts) < count:
            assert time.monotonic() < end, self.texts
            time.sleep(0.001)


@pytest.fixture
def notes(monkeypatch):
    return Notes(monkeypatch)


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_raises_at_the_next_check_and_not_before(number, notes):
    with signals.handled():
        signals.check()
        send(number)
        went_on = True
        with pytest.raises(Interrupted, match="is kept"), contextlib.suppress(Exception):
            signals.check()
        notes.wait()
    assert went_on and notes.texts[0].startswith(f"{signal.Signals(number).name} received: stopping")
    signals.check()


def test_a_signal_is_acknowledged_while_the_main_thread_is_in_native_code(notes):
    with signals.handled():
        thread = send_after(0.05, signal.SIGTERM)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # Neither runs bytecode nor looks for signals.
        end = time.monotonic()
        thread.join()
        notes.wait()
        assert signals.received() == [signal.SIGTERM]
    assert notes.times[0] < end - 0.1


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_while_xla_compiles_lets_it_finish(number, notes):
    def step(x):
        for i in range(60):
            x = jnp.sin(x @ x + i)
        return x

    cached = jax.config.jax_enable_compilation_cache
    with signals.handled():
        lowered = jax.jit(step).lower(jnp.ones((64, 64)))
        jax.config.update("jax_enable_compilation_cache", False)
        thread = send_after(0.05, number)
        try:
            compiled = lowered.compile()
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)
        thread.join()
        assert compiled(jnp.zeros((64, 64))).shape == (64, 64)
        with pytest.raises(Interrupted):
            signals.check()
        notes.wait()


def test_a_second_signal_ends_the_process_but_not_one_that_is_delivered_twice(notes, monkeypatch):
    with signals.handled():
        send(signal.SIGTERM)
        notes.wait()
        send(signal.SIGTERM)  # As `timeout` does: to the process, and to its group.
        time.sleep(0.05)
        assert len(notes.texts) == 1 and notes.statuses == []
        monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
        for count, (number, status) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143)], 2):
            send(number)
            notes.wait(count)
            while len(notes.statuses) < count - 1:
                time.sleep(0.001)
            assert notes.statuses[-1] == status


def test_work_that_saves_first_is_not_interrupted_by_a_check(notes):
    with signals.handled():
        with signals.deferred():
            send(signal.SIGTERM)
            signals.check()
            assert signals.received() == [signal.SIGTERM]
            with signals.deferred(False), pytest.raises(Interrupted):
                signals.check()
            signals.check()
            with signals.waiting():
                send(signal.SIGINT)
        with pytest.raises(Interrupted):
            signals.check()
        signals.forget()
        signals.check()
        notes.wait()


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_ends_a_wait(number, notes, tmp_path):
    reading, writing = os.pipe()
    with signals.handled():
        thread = send_after(0.05, number)
        with pytest.raises(Interrupted), signals.waiting():
            os.read(reading, 1)
        thread.join()
        with pytest.raises(Interrupted), signals.waiting():
            pytest.fail("a signal from before is forgotten")
        signals.forget()
        with cache.locked(tmp_path, print):
            thread = send_after(0.05, number)
            with pytest.raises(Interrupted), cache.locked(tmp_path, print):
                pytest.fail("two hold the lock")
            thread.join()
    for fd in (reading, writing):
        os.close(fd)


@pytest.mark.parametrize("resumes, status, said", [(True, 75, "; saved: start again to continue"), (False, 130, "")])
@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_launcher_exits_with_the_status_of_its_kind(number, resumes, status, said, capfd):
    def works(argv):
        send(number)
        raise Interrupted("saved")

    with pytest.raises(SystemExit) as stop:
        launcher.run(works, resumes=resumes)
    assert stop.value.code == status
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1] == f"stopped by a signal{said}"


def test_a_signal_after_the_last_check_is_not_swallowed(capfd):
    def works(argv):
        send(signal.SIGINT)
        return {"answer": 42}

    with pytest.raises(SystemExit) as stop:
        launcher.run(works)
    assert stop.value.code == 130 and capfd.readouterr().out == ""


def test_a_signal_after_the_result_is_not_acknowledged(notes, monkeypatch):
    with signals.handled():  # As in a process, which takes signals from its start to its end.
        launcher.run(lambda argv: None)
        send(signal.SIGTERM)
        time.sleep(0.05)
        assert notes.texts == []
        monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
        send(signal.SIGTERM)
        notes.wait()
    assert notes.statuses == [143] and "again" in notes.texts[0]


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_while_the_interpreter_ends_changes_no_status(number):
    code = f"""import os, signal
from jaxchat import signals
class Late:  # Python has given its handlers up when the names of a module go.
    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, {int(number)})
late = Late()
signals.listen()
raise SystemExit(75)"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 75


def test_a_user_error_after_a_signal_is_still_a_user_error(capfd):
    def works(argv):
        send(signal.SIGINT)
        raise UserError("there is none")

    with pytest.raises(SystemExit) as stop:
        launcher.run(works)
    assert stop.value.code == 2 and "error: there is none" in capfd.readouterr().err


def flags(place, stage):
    """A run of two steps on a corpus of its own."""
    values = {
        "config": f"configs/tiny.py:{stage}",
        "depth": 1,
        "head_dim": 8,
        "data.vocab": 400,
        "data.row_length": 160,
        "batch_tokens": 640,
        "data.workers": 1,
        "micro_rows": 2,
        "mesh.data": 2,
        "eval_rows": 4,
        "eval_every": 0,
        "steps": 2,
        "directory": place / "runs",
    }
    if stage == "pretrain":
        values |= {"data.train": "tinyworld:train:150", "data.val": "tinyworld:val:4"}
    else:
        values |= {"start_from": "pretrain"}
    if stage == "sft":
        values |= {"data.train": "tinyworld:chat:60", "data.val": "tinyworld:chat:20"}
    if stage == "rl":
        values |= {"rl.prompts": 2, "rl.samples": 4, "rl.max_tokens": 8, "rl.kl": 0.1, "rl.rewards": "brevity"}
    epochs = ["--data.epochs"] if stage == "sft" else []
    return [*(f"--{key}={value}" for key, value in values.items()), *epochs, "--tasks", "--prompts"]


# Of each launcher: its exit status, its arguments, and the functions at whose call a signal arrives.
LAUNCHERS = {
    "pretrain": ("train", 75, ["data.prepare.ensure_tokenizer", "stages.running.compile_step", "stages.running.fit"]),
    "sft": ("train", 75, ["stages.running.inherited", "stages.running.check_tokenizer", "data.prepare.ensure_rows"]),
    "rl": ("train", 75, ["stages.running.inherited", "stages.running.check", "stages.running.check_tokenizer"]),
    "prepare": ("prepare", 75, ["command_line.load", "data.prepare.ensure_tokenizer", "data.workers.make_shard"]),
    "evaluate": ("evaluate", 75, ["checkpoint.locate", "evaluation.asking.load_engine", "decode.engine.Engine.submit"]),
    "chat": ("chat", 130, ["checkpoint.locate", "terminal.load_engine", "decode.engine.Engine.submit"]),
    "plan": ("plan", 130, ["command_line.load", "planning.plan.derived", "planning.plan.show"]),
    "convert": (
        "convert",
        130,
        ["export.convert.load_checkpoint", "export.stablehlo.write_json", "export.convert.parameter_counts"],
    ),
}


def arguments(place, name):
    checkpoint = f"--checkpoint={place}/runs/tiny/pretrain"
    return {
        "prepare": [*flags(place, "pretrain"), f"--data.cache={place}/other"],
        "evaluate": [checkpoint, "--tasks=arithmetic", "--limit=2", "--max_tokens=4", "--slots=2"],
        "chat": [checkpoint, "--prompt=One day", "--max_tokens=4"],
        "plan": flags(place, "pretrain"),
        "convert": [checkpoint, "--to=stablehlo", f"--out={place}/programs", "--length=16", "--prefill_chunk=8"],
    }.get(name) or flags(place, name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory for runs, whose compiled programs are kept in the cache of the tests."""
    update = jax.config.update

    def keep(name, value):
        if name != "jax_compilation_cache_dir":
            update(name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.config, "update", keep)
        patch.setattr(devices, "peak_flops", lambda device: None)  # Measured on a CPU, for a second.
        yield tmp_path_factory.mktemp("signals")


@pytest.mark.parametrize("name", LAUNCHERS)  # In this order: the later ones use the run of the first.
def test_a_signal_at_fixed_moments_stops_a_launcher_and_the_next_start_goes_on(name, place, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    program, status, moments = LAUNCHERS[name]
    main = importlib.import_module(f"launch.{program}").main
    for moment, number in zip(moments, itertools.cycle(signals.STOPPING)):
        with monkeypatch.context() as patch:
            patch.setattr(f"jaxchat.{moment}", sending(number, pydoc.locate(f"jaxchat.{moment}")))
            with pytest.raises(SystemExit) as stop:
                launcher.run(lambda _: main(arguments(place, name)), resumes=status == 75)
        out, err = capfd.readouterr()
        assert stop.value.code == status, f"{moment}: {err}"
        assert err.splitlines()[-1].startswith("stopped by a signal") and "Traceback" not in err
        assert '"' not in out, f"{moment}: {out}"
    if name not in ("sft", "rl"):  # signals_at_random.py finishes them, too.
        assert main(arguments(place, name))


def sending(number, real):
    """The function, with a signal at its first call; a second one, a second later, would end the tests at once."""
    sent = []

    def call(*args, **named):
        if not sent:
            sent.append(number)
            send(number)
        return real(*args, **named)

    return call
