"""Training beside torch: the October 2025 shape, AdamW, documents not kept apart, equal rows, in one run."""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import Any

import jax

from jaxchat import devices
from jaxchat.benchmarks.accelerator.options import Bench, Make
from jaxchat.benchmarks.accelerator.report import Rows
from jaxchat.benchmarks.accelerator.torch_side import Asked
from jaxchat.benchmarks.accelerator.training import Variant, measure
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.model.counts import flops_per_token
from jaxchat.sharding import Mesh

MODULE = "jaxchat.benchmarks.accelerator.torch_side"


def peer(bench: Bench, make: Make, rows: Rows) -> None:
    """Ours, then every peer, at the same rows of one micro-batch; a peer that needs fewer rows says so."""
    tokens = bench.peer_rows * bench.row_length
    variant = Variant(bench.depth, family="october2025", adamw=True)
    e = dataclasses.replace(variant.experiment(make, tokens), mesh=Mesh(1))
    label = {"depth": bench.depth, "peer": "none"}
    ours = rows.attempt(label, lambda: measure(e, steps=bench.steps, tries=bench.tries, clock=rows.clock))
    for kind in bench.peers:
        measured = functools.partial(beside, e, kind, bench, ours, rows)
        rows.attempt({"depth": bench.depth, "peer": kind}, measured)


def beside(e: Experiment, kind: str, bench: Bench, ours: Any, rows: Rows) -> dict[str, Any]:
    """A peer's numbers, its share of the peak by the same count of FLOPs, and how many times as fast we are."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    found = run(asked(e, kind, bench, device), seconds=max(10.0, rows.clock.left()))
    peak = devices.peak_flops(jax.devices()[0])
    flops = flops_per_token(e.model, e.data.row_length)["total"]
    speed = found["tokens_per_second"]
    return found | {
        "mfu": None if peak is None else round(speed * flops / peak, 4),
        "ratio": None if ours is None else round(ours["tokens_per_second"] / speed, 4),
        "torch_compile": bench.peer_compile,
    }


def asked(e: Experiment, kind: str, bench: Bench, device: str) -> Asked:
    c, mixer = e.model, e.model.pattern[0]
    assert mixer.rope is not None and c.softcap is not None
    return Asked(
        kind=kind,
        vocab=c.vocab,
        width=c.width,
        depth=c.depth,
        heads=mixer.heads,
        hidden=c.mlp.hidden,
        rope_base=mixer.rope.base,
        softcap=c.softcap,
        row_length=e.data.row_length,
        rows=bench.peer_rows,
        steps=bench.steps,
        compiled=bench.peer_compile,
        device=device,
        dtype="float32" if device == "cpu" else "bfloat16",
    )


def run(wanted: Asked, *, seconds: float) -> dict[str, Any]:
    """What the torch process prints; raises UserError with its last words where it fails, or takes too long."""
    command = [sys.executable, "-m", MODULE, json.dumps(dataclasses.asdict(wanted))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f"torch was not done after {seconds:.0f} seconds") from None
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no words"]
        if "ModuleNotFoundError" in words[-1]:
            raise UserError(f"{words[-1]}: pip install 'jaxchat[interop]'")
        raise UserError(f"torch ended with status {done.returncode}: {words[-1][:200]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
