"""Training speed of the step that launch.train runs, beside the same model in transformers under torch.compile.

Both take the same AdamW steps from the same weights on the same tokens, in blocks that alternate, so that a busy
machine slows both. Both losses are reported: they show that the work was the same.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import options, peer, report, timing
from jaxchat import compilation, devices, launcher, sharding
from jaxchat.experiment import Experiment
from jaxchat.model.counts import flops_per_token
from jaxchat.optimizer import AdamW, Optimizer
from jaxchat.train import Cadence, Hooks, State, fit, init_state

BATCHES, DOCUMENT = 4, 512  # Batches that take turns; mean tokens of a document.
LEAST_STEPS = 3  # Of a block, however late it is.


def run(bench: options.Bench, arguments: list[str]) -> dict[str, Any]:
    """Trains the model of a configuration with one host device per core, if that divides the rows."""
    e = options.load(bench, arguments)
    jax.config.update("jax_num_cpu_devices", max(n for n in range(1, bench.threads + 1) if e.batch_rows % n == 0))
    jax.config.update("jax_enable_compilation_cache", False)  # So that first steps can be compared.
    return measure(adamw_only(e), bench) | report.surroundings(bench)


def adamw_only(e: Experiment) -> Experiment:
    """The experiment with the peer's AdamW and a constant learning rate for every parameter."""
    group = AdamW(peer.RATE, *peer.BETAS, peer.WEIGHT_DECAY, peer.EPS)
    return dataclasses.replace(e, optimizer=Optimizer(None, *(group,) * 6, warmup_steps=0, warmdown_fraction=0.0))


def start_state(setup: compilation.Setup) -> State:
    """A fresh state in its places."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    start = jax.jit(lambda key: init_state(setup.transformer, setup.tx, key), out_shardings=placed)
    with jax.set_mesh(setup.mesh):
        return start(jax.random.key(setup.experiment.seed))


class Trainer:
    """A compiled training step, its state, and batches that take turns."""

    def __init__(self, setup: compilation.Setup, ids: np.ndarray) -> None:
        with jax.set_mesh(setup.mesh):
            self.compiled, e = compilation.compile_step(setup, launcher.log), setup.experiment
        documents = np.random.default_rng(e.seed).random(ids[..., 1:].shape) < 1 / DOCUMENT
        columns = {"tokens": ids[..., :-1], "targets": ids[..., 1:], "weights": np.ones(documents.shape, np.float32)}
        columns["segments"] = np.cumsum(documents, axis=-1, dtype=np.int32)
        shape = (len(ids), -1, self.compiled.rows, e.data.row_length)
        parts = zip(*(column.reshape(shape) for column in columns.values()))
        self._batches = [sharding.put_batch(setup.mesh, dict(zip(columns, part))) for part in parts]
        self._mesh, self._number, self._state = setup.mesh, 0, start_state(setup)

    def train(self, steps: int) -> peer.StepOutputs:
        """`steps` steps, after one that warms up."""
        found, nothing = list[tuple[float, float]](), lambda *_: None
        keep = lambda number, state: self.__dict__.update(_number=number, _state=state)  # noqa: E731
        log = lambda _, values, seconds: found.append((seconds, values["loss"]))  # noqa: E731
        batch_at = lambda index, _: self._batches[index % len(self._batches)]  # noqa: E731
        hooks = Hooks(log, keep, nothing, nothing, lambda: False)
        plan: dict[str, Any] = {"start": self._number, "steps": self._number + 1 + steps, "hooks": hooks}
        with jax.set_mesh(self._mesh):
            fit(self._state, self.compiled.step, batch_at, cadence=Cadence(0, 0, 0), **plan)
        seconds, losses = zip(*found)
        return peer.StepOutputs(list(seconds[1:]), list(losses), self.compiled.rows)


def measure(e: Experiment, bench: options.Bench, deadline: float = float("inf")) -> dict[str, Any]:
    """Trains both sides in blocks, shorter ones if the deadline is near. The peak of a CPU is measured in between."""
    setup, length = compilation.make_setup(e, launcher.log), e.data.row_length
    device, dtype, shape = setup.mesh.devices.flat[0], setup.transformer.dtype, (BATCHES, e.batch_rows, length + 1)
    ids = np.random.default_rng(e.seed).integers(0, e.model.vocab, shape, np.int32)
    sides, first = dict[str, Callable[[], Any]](), dict[str, float]()
    if bench.peer != "none":
        torch = peer.Peer(e.model, start_state(setup).params, ids=ids, dtype=dtype, threads=bench.threads)
        (_, first["peer"]), _ = timing.timed(lambda: torch.train(0)), torch.train(0)
        sides["peer"] = lambda: torch.train(steps)
    ours = Trainer(setup, ids)
    first["ours"] = ours.compiled.seconds + timing.timed(lambda: ours.train(0))[1]
    _, once = timing.timed(lambda: ours.train(0))
    steps = int(min(bench.block_steps, max(LEAST_STEPS, (deadline - time.monotonic()) / once / bench.blocks)))
    sides |= {"ours": lambda: ours.train(steps), "peak": lambda: devices.peak_flops(device)}
    _, found = timing.alternate(sides, bench.blocks, bench.pause)
    peak = max((value * setup.mesh.size for value in found.pop("peak") if value is not None), default=None)
    row: dict[str, Any] = {"ratio": None, "batch_rows": e.batch_rows, "row_length": length, "devices": setup.mesh.size}
    for name, blocks in found.items():
        seconds = timing.spread([s for block in blocks for s in block.seconds])
        values = {"tokens_per_second": e.batch_tokens / seconds["median"], "loss": blocks[-1].losses[-1]}
        values |= {"step_seconds": seconds, "first_step_seconds": first[name], "micro_rows": blocks[-1].rows}
        row |= {("peer_" if name == "peer" else "") + column: value for column, value in values.items()}
    flops, speed = flops_per_token(e.model, length)["total"], row["tokens_per_second"]
    row |= {"ratio": speed / row["peer_tokens_per_second"]} if "peer" in found else {}
    row |= {"roofline_fraction": peak and speed * flops / peak, "peak_flops_per_second": peak, "flops_per_token": flops}
    row |= {"compile_seconds": ours.compiled.seconds, "step_bytes": ours.compiled.tried[ours.compiled.rows]}
    return row | {"attention": setup.transformer.attention} | report.facts_of(e.model, dtype)
