"""Sends SIGTERM and SIGINT to every launcher at random moments; checks how each ends, and that the next start goes on.

    python tests/signals_at_random.py OUT.jsonl [--moments=50] [--minutes=8] [--only=pretrain,chat] [--base=DIR]

A chain of starts of one launcher begins without its files and without compiled programs, so that signals come while
XLA compiles. A start that ends before its moment ends the chain: its result must equal that of a run that got no
signal. A line per start is appended to OUT.jsonl, and the table is of all its lines. Moments are random, in processor
time, because others may share the cores. Four of five processes are forks of one that has imported the program but not
started JAX's backend, which saves the time of the imports; the fifth is an interpreter of its own. A signal before the
command takes signals, while Python starts, is counted separately: it ends the process as it ends any other.
"""

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ("step", "loss", "val_bpb", "val_loss", "text", "rows", "tokens", "arithmetic", "stages", "parameters")
COMMON = (
    "--depth=1 --head_dim=8 --data.vocab=400 --data.row_length=160 --data.workers=1 --micro_rows=2 --mesh.data=2 "
    "--batch_tokens=640"
)
SHORT = "--steps=4 --save_every=2 --eval_every=2 --eval_rows=4 --keep_params=2 --tasks --prompts"
LAUNCHERS = {
    "pretrain": f"train --config=configs/tiny.py {COMMON} {SHORT} --data.train=tinyworld:train:150 "
    "--data.val=tinyworld:val:4 --directory=RUNS",
    "sft": f"train --config=configs/tiny.py:sft {COMMON} {SHORT} --data.train=tinyworld:chat:60 "
    "--data.val=tinyworld:chat:20 --data.epochs --directory=RUNS",
    "rl": f"train --config=configs/tiny.py:rl {COMMON} {SHORT} --rl.prompts=2 --rl.samples=4 --rl.max_tokens=8 "
    "--rl.kl=0.1 --rl.rewards=brevity --directory=RUNS",
    "evaluate": "evaluate --checkpoint=RUNS/tiny/sft --tasks arithmetic bpb --limit=40 --max_tokens=32",
    "chat": "chat --checkpoint=RUNS/tiny/sft --prompt=Hello --max_tokens=100 --temperature=0",
    "prepare": f"prepare --config=configs/tiny.py {COMMON} --data.train=tinyworld:train:20000 --directory=RUNS "
    "--data.cache=RUNS/fresh",
    "plan": "plan --config=configs/d12.py",
    "convert": "convert --checkpoint=RUNS/tiny/sft --to=stablehlo --out=RUNS/programs",
}
STATUS = dict.fromkeys(LAUNCHERS, 75) | {"chat": 130, "plan": 130, "convert": 130}
NEEDS = {"sft": ["pretrain"], "rl": ["pretrain", "sft"]}  # Of a training stage; the others need all of them.
HEADER = "launcher   signals  before  status        longest s  acknowledged  chains  equal"
BEGIN, SEPARATE = 0.98, 5  # A chain's first start seldom ends before its moment; every fifth is no fork.
SERVER = """
import importlib, json, os, pkgutil, runpy, sys, warnings
import jaxchat, launch
from jaxchat import signals
for module in pkgutil.walk_packages(jaxchat.__path__, "jaxchat."):
    try: importlib.import_module(module.name)
    except ImportError: pass
warnings.simplefilter("ignore")  # JAX warns of forks, which are safe before its backend starts.
print(sum(os.times()[:2]), flush=True)
commands = open(os.dup(0))
for line in commands:
    words, out, err, separate = json.loads(line)
    if pid := os.fork():
        print(pid, flush=True)
        _, status, usage = os.wait4(pid, 0)
        print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, flush=True)
        continue
    for number, place in enumerate((os.devnull, out, err)):
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY), number)
    if separate:
        os.execv(sys.executable, [sys.executable, "-m", f"launch.{words[0]}", *words[1:]])
    commands.close()
    signals.listen()  # As launch/__init__.py does for a command.
    sys.excepthook = launch.end_with_a_sentence
    warnings.resetwarnings()
    sys.argv = words
    runpy.run_module(f"launch.{words[0]}", run_name="__main__", alter_sys=True)
    break
"""
"""Forks a process for each command on its standard input; prints its id, then its status and processor seconds."""


class Ended(NamedTuple):
    """A process that ended: exit status, processor seconds, and what it printed."""

    status: int
    seconds: float
    out: str
    err: str


class Launchers:
    """Starts launchers one after the other, as forks or as interpreters of their own (`separate`)."""

    def __init__(self, scratch: Path) -> None:
        self._places = scratch / "out", scratch / "err"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TERM": "dumb"}
        # As in the tests: without the costly passes of the compiler. Small programs are stored, too.
        env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        if version("jax") < "0.11":
            env["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=env, **pipes)  # type: ignore[call-overload]
        self.import_seconds = float(self._server.stdout.readline())

    def start(self, name: str, runs: Path, *, separate: bool = False) -> int:
        """Starts a launcher on the runs of a directory; returns the id of its process."""
        line = json.dumps([LAUNCHERS[name].replace("RUNS", str(runs)).split(), *map(str, self._places), separate])
        self._server.stdin.write(f"{line}\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def ended(self) -> bool:
        return bool(select.select([self._server.stdout], [], [], 0.01)[0])

    def wait(self) -> Ended:
        status, seconds = self._server.stdout.readline().split()
        return Ended(int(status), float(seconds), *(place.read_text() for place in self._places))

    def finish(self, name: str, runs: Path) -> tuple[dict[str, object], float]:
        """Runs a launcher to its end; returns its result and the processor seconds."""
        self.start(name, runs)
        done = self.wait()
        if done.status:
            raise SystemExit(f"{name} ended with {done.status}:\n{done.err}")
        return result(done.out), done.seconds

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


def result(out: str) -> dict[str, object]:
    """The part of a launcher's result that no clock decides; empty if it printed none."""
    line = json.loads((out.splitlines() or ["{}"])[-1])
    return {key: line[key] for key in RESULTS if key in line}


def processor_seconds(pid: int) -> float:
    """Processor time that a process took so far; 0 once it has gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def catches(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def fresh(base: Path, name: str, place: Path) -> Path:
    """A copy of the finished stages that a launcher needs, without the compiled programs."""
    shutil.rmtree(place, ignore_errors=True)
    for stage in ("pretrain", "sft", "rl", "tokenizer", "rows"):
        if (base / "tiny" / stage).exists() and (name not in ("pretrain", "sft", "rl") or stage in NEEDS.get(name, [])):
            shutil.copytree(base / "tiny" / stage, place / "tiny" / stage)
    if name in ("sft", "rl"):
        shutil.copytree(base / "tiny/tokenizer", place / "tiny/tokenizer")
    return place


class Whole(NamedTuple):
    """A launcher that no signal met: its result, and processor seconds without and with compiled programs."""

    result: dict[str, object]
    cold: float
    warm: float


def start_once(
    launchers: Launchers, name: str, runs: Path, whole: Whole, draw: random.Random, case: int
) -> dict[str, object]:
    """One start with one signal at a random moment; what happened, with `equal` if it ended before that."""
    separate, number = case % SEPARATE == SEPARATE - 1, (signal.SIGTERM, signal.SIGINT)[case % 2]
    begins = not (runs / "begun").exists()
    (runs / "begun").mkdir(parents=True, exist_ok=True)
    after = draw.uniform(0, BEGIN * whole.cold if begins else whole.warm / 0.8)
    after += separate * draw.uniform(0, launchers.import_seconds)
    pid = launchers.start(name, runs, separate=separate)
    sent, ready = 0.0, True
    while not sent and not launchers.ended():
        if processor_seconds(pid) >= after:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # It has just ended.
                ready = catches(pid)
                os.kill(pid, number)
                sent = time.monotonic()
    done = launchers.wait()
    heard = "received: stopping" in done.err
    if not sent or (done.out.strip() and not heard):  # Too late: the result is printed.
        equal = done.status == 0 and result(done.out) == whole.result
        record = {"launcher": name, "status": done.status, "equal": equal}
        return record | ({} if equal else {"err": done.err, "out": done.out})
    record = {"launcher": name, "signal": number.name, "after": round(after, 2), "begins": begins, "fork": not separate}
    record |= {"before": not ready, "status": done.status, "seconds": round(time.monotonic() - sent, 2)}
    right = done.status == STATUS[name] and heard and "Traceback" not in done.err and not done.out.strip()
    record |= {"acknowledged": heard, "right": right}
    return record | ({} if right or not ready else {"err": done.err, "out": done.out})


def table(records: list[dict[str, object]]) -> str:
    lines = [HEADER]
    for name in LAUNCHERS:
        own = [record for record in records if record["launcher"] == name]
        sent, ends = [r for r in own if "signal" in r], [r for r in own if "equal" in r]
        met = [record for record in sent if not record["before"]]
        counts = Counter(str(record["status"]) for record in met)
        statuses = ", ".join(f"{count} x {status}" for status, count in counts.items())
        longest = max((float(str(record["seconds"])) for record in met), default=0.0)
        heard, equal = sum(bool(record["acknowledged"]) for record in met), sum(bool(r["equal"]) for r in ends)
        lines.append(
            f"{name:<10} {len(met):>7} {len(sent) - len(met):>7}  {statuses:<13} {longest:>9.1f}  {heard:>12}  "
            f"{len(ends):>6}  {equal:>5}"
        )
    return "\n".join(lines)


def prepared(launchers: Launchers, base: Path, scratch: Path, names: list[str]) -> dict[str, Whole]:
    """Finishes the three stages in `base` once, and each launcher on them."""
    for stage in ("pretrain", "sft", "rl"):
        if not (base / "tiny" / stage / "sizes.json").exists():
            launchers.finish(stage, base)
    wholes = {}
    for name in names:
        path = base / f"{name}.json"
        if not path.exists():
            runs = fresh(base, name, scratch / "whole")
            found, cold = launchers.finish(name, runs)
            programs = runs / "cache/xla"
            programs.mkdir(parents=True, exist_ok=True)  # Some compile nothing.
            programs.rename(scratch / "xla")
            fresh(base, name, runs)
            shutil.move(scratch / "xla", programs)
            path.write_text(json.dumps([found, cold, launchers.finish(name, runs)[1]]))
        wholes[name] = Whole(*json.loads(path.read_text()))
    return wholes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--moments", type=int, default=50, help="per launcher, in OUT.jsonl")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop earlier; the next call goes on")
    parser.add_argument("--only", default=",".join(LAUNCHERS))
    parser.add_argument("--base", type=Path, help="keep the finished runs there for the next call")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Else a job in the background hands down that it ignores.
    end, names = time.monotonic() + 60 * options.minutes, options.only.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        launchers, base = Launchers(Path(scratch)), options.base or Path(scratch) / "base"
        whole = prepared(launchers, base, Path(scratch), names)
        records = [json.loads(line) for line in options.out.open()] if options.out.exists() else []
        met = Counter(r["launcher"] for r in records if r.get("before") is False)
        draw, runs, ended, name = random.Random(len(records)), Path(scratch) / "runs", True, names[0]
        while time.monotonic() < end and not (ended and min(met[name] for name in names) >= options.moments):
            if ended:
                name = min(names, key=lambda name: met[name])
                fresh(base, name, runs)
            record = start_once(launchers, name, runs, whole[name], draw, met[name])
            ended = "equal" in record
            met[name] += record.get("before") is False
            records.append(record)
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
        launchers.close()
    print(table(records))


if __name__ == "__main__":
    main()
