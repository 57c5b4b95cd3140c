"""Sends SIGTERM and SIGINT to every launcher at random moments; checks how each ends, and that the next start goes on.

    python tests/signals_at_random.py OUT.jsonl [--moments=50] [--minutes=8] [--only=pretrain,chat] [--base=DIR]

Every moment is a process of its own, whose programs are compiled anew, so that signals meet XLA; the start after it
uses the cache of compiled programs, and its result must equal that of a run which no signal met. A line per moment is
appended to OUT.jsonl, and the table is of all its lines. A signal before the command takes signals, while Python
starts, is counted apart: it ends the process as it ends any other.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ("step", "loss", "val_bpb", "val_loss", "text", "rows", "tokens", "arithmetic", "stages", "parameters")
COMMON = (
    "--depth=1 --head_dim=8 --data.vocab=400 --data.row_length=160 --data.workers=1 --micro_rows=2 --mesh.data=2 "
    "--batch_tokens=640"
)
SHORT = "--steps=8 --save_every=4 --eval_every=4 --eval_rows=4 --tasks --prompts"
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
HEADER = "launcher   signals  before  status        longest s  acknowledged  resumed  equal"


def start(name: str, runs: Path) -> "subprocess.Popen[str]":
    program, *words = LAUNCHERS[name].replace("RUNS", str(runs)).split()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    command = [sys.executable, "-m", f"launch.{program}", *words]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


def finish(name: str, runs: Path) -> dict[str, object]:
    """Runs a launcher to its end; returns the part of its result that no clock decides."""
    process = start(name, runs)
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}:\n{err}")
    result = json.loads(out.splitlines()[-1])
    return {key: result[key] for key in RESULTS if key in result}


def catches(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def fresh(base: Path, name: str, place: Path, *, cache: bool) -> Path:
    """A copy of the finished stages that a launcher needs; without the compiled programs if not `cache`."""
    shutil.rmtree(place, ignore_errors=True)
    for stage in ("pretrain", "sft", "rl", "tokenizer", "rows"):
        if (base / "tiny" / stage).exists() and (name not in ("pretrain", "sft", "rl") or stage in NEEDS.get(name, [])):
            shutil.copytree(base / "tiny" / stage, place / "tiny" / stage)
    if name in ("sft", "rl"):
        shutil.copytree(base / "tiny/tokenizer", place / "tiny/tokenizer")
    if cache:
        add_cache(base, place)
    return place


def add_cache(base: Path, place: Path) -> None:
    if (base / "cache/xla").exists():
        shutil.copytree(base / "cache/xla", place / "cache/xla", dirs_exist_ok=True)


def moment(
    name: str, base: Path, place: Path, whole: dict[str, object], after: float, number: int
) -> dict[str, object]:
    """Sends one signal `after` seconds; returns what happened, nothing if that was too late."""
    runs = fresh(base, name, place, cache=False)
    process = start(name, runs)
    try:
        process.wait(after)
        process.communicate()
        return {}
    except subprocess.TimeoutExpired:
        ready = catches(process.pid)
        process.send_signal(number)
        sent = time.monotonic()
    out, err = process.communicate()
    if ready and process.returncode == 0 and out.strip() and "received: stopping" not in err:
        return {}  # The result was printed, and the process was leaving.
    record: dict[str, object] = {
        "launcher": name,
        "signal": signal.Signals(number).name,
        "after": round(after, 2),
        "before": not ready,
        "status": process.returncode,
        "seconds": round(time.monotonic() - sent, 2),
        "acknowledged": "received: stopping" in err,
        "clean": "Traceback" not in err and not out.strip(),
    }
    if name not in ("chat", "plan"):  # They write nothing.
        add_cache(base, runs)
        record["equal"] = finish(name, runs) == whole
    bad = ready and not (process.returncode == STATUS[name] and record["acknowledged"] and record["clean"])
    if bad or record.get("equal") is False:
        print(json.dumps(record), err, out, sep="\n", file=sys.stderr)
    return record


def table(records: list[dict[str, object]]) -> str:
    lines = [HEADER]
    for name in LAUNCHERS:
        own = [record for record in records if record["launcher"] == name]
        met = [record for record in own if not record["before"]]
        counts = Counter(str(record["status"]) for record in met)
        statuses = ", ".join(f"{count} x {status}" for status, count in counts.items())
        longest = max((float(str(record["seconds"])) for record in met), default=0.0)
        heard, again = sum(bool(record["acknowledged"]) for record in met), [r["equal"] for r in own if "equal" in r]
        lines.append(
            f"{name:<10} {len(met):>7} {len(own) - len(met):>7}  {statuses:<13} {longest:>9.1f}  {heard:>12}  "
            f"{len(again):>7}  {sum(map(bool, again)):>5}"
        )
    return "\n".join(lines)


def prepared(base: Path, scratch: Path, names: list[str]) -> dict[str, tuple[dict[str, object], float]]:
    """Finishes the three stages in `base` once; the result and the seconds of each launcher when nothing stops it."""
    for stage in ("pretrain", "sft", "rl"):
        if not (base / "tiny" / stage / "sizes.json").exists():
            finish(stage, base)
    path = base / "whole.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        if name not in known:
            began = time.monotonic()
            known[name] = finish(name, fresh(base, name, scratch / "whole", cache=False)), time.monotonic() - began
            path.write_text(json.dumps(known))
    return known


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
        whole = prepared(options.base or Path(scratch) / "base", Path(scratch), names)
        records = [json.loads(line) for line in options.out.open()] if options.out.exists() else []
        counts = Counter(record["launcher"] for record in records if not record["before"])
        draw = random.Random(len(records))
        while time.monotonic() < end and (name := min(names, key=lambda name: counts[name])):
            if counts[name] >= options.moments:
                break
            number = (signal.SIGTERM, signal.SIGINT)[counts[name] % 2]
            base = options.base or Path(scratch) / "base"
            record = moment(name, base, Path(scratch) / "runs", whole[name][0], draw.uniform(0, whole[name][1]), number)
            if record:
                counts[name] += not record["before"]
                records.append(record)
                with options.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
