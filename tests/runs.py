"""Runs in processes of their own, stopped at some moment, and how two of them are compared."""

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from documents import environment

from jaxchat import checkpoint, processes
from jaxchat.experiment import Experiment
from jaxchat.model import Transformer

ROOT = Path(__file__).parent.parent
PATIENCE = 8  # Seconds without a heartbeat after which a process counts as lost.
TIMES = ("seconds", "sample_seconds", "score_seconds", "train_seconds", "tokens_per_second", "mfu", "memory_bytes")


def last_of_each(words):
    """The words of a command, of several with the same flag the last only."""
    names = [word.partition("=")[0] for word in words]
    return [w for i, w in enumerate(words) if not (w.startswith("--") and names[i] in names[i + 1 :])]


def launch(*arguments, program="launch.train", command=None, **variables):
    """A launcher, or another command, in a process of its own."""
    command = command or [sys.executable, "-m", program, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment() | {"JAX_PLATFORMS": "cpu"} | variables, **pipes)


def launch_group(count, *arguments, program="launch.train", own=None, **variables):
    """A launcher in several processes that are one run; `own` are further arguments of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    group = {processes.TIMEOUT: str(PATIENCE), processes.ADDRESS: address, processes.COUNT: str(count)} | variables
    own = own or [[]] * count
    return [
        launch(*arguments, *own[index], program=program, **group, **{processes.INDEX: str(index)})
        for index in range(count)
    ]


def finish_group(processes, statuses=None):
    """What each printed, on both streams; they must be read together, for none ends before the others."""
    with ThreadPoolExecutor(len(processes)) as pool:
        told = list(pool.map(lambda process: process.communicate(), processes))
    found = [process.returncode for process in processes]
    assert found == (statuses or [0] * len(processes)), "\n\n".join(err[-3000:] for _, err in told)
    return told


def finish(process, status=0):
    out, err = process.communicate()
    assert process.returncode == status, err
    return out, err


def send_at(process, path, step, number):
    """Sends a signal once metrics.jsonl tells of a step."""
    while process.poll() is None and not (path.exists() and f'"step":{step},' in path.read_text()):
        time.sleep(0.002)
    process.send_signal(number)


def records(stage):
    """metrics.jsonl without what a clock decides."""
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def parameters(stage, step=None):
    """The parameters of a checkpoint, on the host."""
    experiment = checkpoint.read_experiment(stage, Experiment)
    step = step or checkpoint.finished_steps(stage)[-1]
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = Transformer(experiment.model).shapes()
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed), shapes)
    return jax.tree.map(np.asarray, checkpoint.load_params(stage, step, abstract))


def assert_same_end(stage, other):
    assert records(stage) == records(other)
    assert checkpoint.finished_steps(stage)[-1] == checkpoint.finished_steps(other)[-1]
    jax.tree.map(np.testing.assert_array_equal, parameters(stage), parameters(other))
