"""Compiles the training step ahead of time for absent hardware, and searches the largest setting that fits."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxchat import compilation
from jaxchat.data.cache import Log
from jaxchat.errors import UserError
from jaxchat.experiment import Experiment
from jaxchat.planning import plan
from jaxchat.planning.chips import GiB, Topology
from jaxchat.planning.decoding import fit_decoding

REMATS = ("none", "dots", "attention", "full")  # From the fastest to the least memory.


@dataclass(frozen=True)
class Fit:
    """Result of compiling one setting: bytes needed per device (inf if unknown), and compile time in seconds."""

    micro_rows: int
    remat: str
    attention: str
    fits: bool
    bytes: float
    seconds: float


def compiled(e: Experiment, topology: Topology, micro_rows: int, remat: str, log: Log) -> Fit:
    """Compiles the training step of an experiment with the given micro-batch and remat policy."""
    model = dataclasses.replace(e.model, remat=remat)  # type: ignore[arg-type]
    changed = dataclasses.replace(e, model=model, micro_rows=micro_rows)
    setup = compilation.make_setup(changed, lambda _: None, topology.devices())
    # Settings found by a search keep the same reserve as in launch.train; the user's own setting may use all memory.
    limit = topology.chip.memory * (1 if e.micro_rows == micro_rows else compilation.MEMORY_SHARE)
    limit -= compilation.reference_bytes(setup)
    start = time.perf_counter()
    with jax.set_mesh(setup.mesh):
        program, needed = compilation.compile_lowered(compilation.lower_step(setup, micro_rows), setup, log)
    fits = program is not None and needed <= limit
    attention = setup.transformer.attention
    fit = Fit(micro_rows, remat, attention, fits, needed, time.perf_counter() - start)
    size = f"{needed / GiB:.2f} GiB" if math.isfinite(needed) else "more"
    log(
        f"{topology.name}: micro_rows={micro_rows} remat={remat} attention={attention} "
        f"{'fits in' if fits else 'needs'} {size} of {limit / GiB:.2f}; compiled in {fit.seconds:.0f} s"
    )
    return fit


def best(e: Experiment, topology: Topology, log: Log) -> tuple[Fit | None, list[Fit]]:
    """Finds the largest micro-batch under the least remat that fits; returns it, or None, and all attempts.

    Each remat policy is searched as launch.train searches its micro-batch.
    """
    setup = compilation.make_setup(dataclasses.replace(e, micro_rows="auto"), lambda _: None, topology.devices())
    limit = topology.chip.memory * compilation.MEMORY_SHARE - compilation.reference_bytes(setup)
    state = compilation.state_bytes(setup)
    tried: list[Fit] = []
    if state > limit:
        log(f"{topology.name}: the training state needs {state / GiB:.2f} GiB of {limit / GiB:.2f} per device")
        return None, tried
    for remat in REMATS:
        choices = compilation.micro_choices(setup)
        while choices:
            tried.append(compiled(e, topology, choices[0], remat, log))
            if tried[-1].fits:
                return tried[-1], tried
            choices = compilation.smaller_choices(choices, tried[-1].bytes, state=state, limit=limit)
    return None, tried


def fits(
    e: Experiment, topologies: Sequence[Topology], log: Log, *, shallower: Callable[[int], Experiment]
) -> dict[str, dict[str, Any]]:
    """`fit` by topology. One of several on which the experiment does not fit has the reason; a single one raises."""
    results: dict[str, dict[str, Any]] = {}
    for there in topologies:
        try:
            results[there.name] = fit(e, there, log, shallower=shallower)
        except UserError as error:
            if len(topologies) == 1:
                raise
            log(f"{there.name}: {error}")
            results[there.name] = {"fits": False, "why": str(error)}
    return results


def fit(e: Experiment, topology: Topology, log: Log, *, shallower: Callable[[int], Experiment]) -> dict[str, Any]:
    """Compiles the experiment's micro-batch, or searches the largest that fits; returns its memory, flags and attempts.

    `shallower(depth)` builds the experiment at a smaller depth, to find a remedy if nothing fits.

    Raises:
        UserError: the experiment does not fit; the message names the smallest change that does, tested by compiling.
    """
    if e.micro_rows == "auto":
        found, tried = best(e, topology, log)
    else:
        found, tried = compiled(e, topology, e.micro_rows, e.model.remat, log), []
    if found is None or not found.fits:
        tested = f"micro_rows={e.micro_rows} and model.remat={e.model.remat}"
        raise UserError(
            f"{e.name} does not fit {topology.name} with {tested}: {remedy(e, topology, log, shallower, tried)}"
        )
    return {
        "fits": True,
        "exact": topology.exact,
        "micro_rows": found.micro_rows,
        "remat": found.remat,
        "attention": found.attention,
        "bytes_per_device": int(found.bytes),
        "limit": int(topology.chip.memory),
        "flags": flags(found),
        "tried": [dataclasses.asdict(one) for one in tried],
        "decoding": fit_decoding(e, topology, log),
    }


def remedy(
    e: Experiment, topology: Topology, log: Log, shallower: Callable[[int], Experiment], tried: list[Fit]
) -> str:
    """Describes the smallest change under which the experiment fits: micro-batch and remat, else mesh, else depth.

    `tried` holds the attempts that did not fit.
    """
    if e.micro_rows != "auto":
        found, tried = best(e, topology, log)
        if found is not None:
            return f"set {flags(found)}"
    most = topology.chips * e.mesh.fsdp // e.mesh.split
    if e.mesh.fsdp < most:
        split = dataclasses.replace(e.mesh, data=0, fsdp=most)
        found, _ = best(dataclasses.replace(e, mesh=split), topology, log)
        if found is not None:
            free = "--mesh.data=0 " if e.mesh.data else ""
            return f"set {free}--mesh.fsdp={split.fsdp} {flags(found)}"
    whole, per_state = sum(plan.state_bytes(e).values()), 1.0
    if needed := [one.bytes for one in tried if math.isfinite(one.bytes)]:
        per_state = min(needed) / whole * e.mesh.split
    for depth in range(e.depth - 1, 0, -1):
        try:
            smaller = dataclasses.replace(shallower(depth), micro_rows="auto")
        except (UserError, ValueError):  # The model or batch of this depth does not divide among the devices.
            continue
        expected = per_state * sum(plan.state_bytes(smaller).values()) / e.mesh.split
        if expected > topology.chip.memory * compilation.MEMORY_SHARE:
            continue  # Extrapolated from the memory of the full depth, it cannot fit.
        log(f"{topology.name}: {e.name} does not fit at depth={e.depth} with any setting; trying depth={depth}")
        found, _ = best(smaller, topology, log)
        if found is not None:
            return (
                "it does not fit with one row per device and remat=full either; "
                f"set --depth={depth} {flags(found)}, or use more chips"
            )
    return "no depth fits; use more chips or a smaller --data.row_length"


def flags(found: Fit) -> str:
    return f"--micro_rows={found.micro_rows} --model.remat={found.remat}"
