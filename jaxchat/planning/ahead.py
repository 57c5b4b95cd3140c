"""Compiling the training step for hardware that is not here, and the largest setting that fits it."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxchat import compilation
from jaxchat.config import UserError
from jaxchat.experiment import Experiment
from jaxchat.planning.chips import GiB, Topology

REMATS = ("none", "dots", "attention", "full")  # From the fastest to the smallest.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Fit:
    """What a compiler says of one setting: bytes of one device (what it needs, where it does not fit), and seconds."""

    micro_rows: int
    remat: str
    attention: str
    fits: bool
    bytes: float
    seconds: float


def compiled(e: Experiment, topology: Topology, micro_rows: int, remat: str, say: Say) -> Fit:
    """Compiles the real training step of a setting."""
    model = dataclasses.replace(e.model, remat=remat)  # type: ignore[arg-type]
    changed = dataclasses.replace(e, model=model, micro_rows=micro_rows)
    setup = compilation.make_setup(changed, lambda _: None, topology.devices())
    # A search leaves as much free as launch.train does where it chooses itself.
    limit = topology.chip.memory * (1 if e.micro_rows == micro_rows else compilation.MEMORY_SHARE)
    start = time.perf_counter()
    with jax.set_mesh(setup.mesh):
        program, needed = compilation.compile_lowered(compilation.lower_step(setup, micro_rows), setup, say)
    fits = program is not None and needed <= limit
    attention = setup.transformer.attention
    fit = Fit(micro_rows, remat, attention, fits, needed, time.perf_counter() - start)
    size = f"{needed / GiB:.2f} GiB" if math.isfinite(needed) else "more"
    say(
        f"{topology.name}: micro_rows={micro_rows} remat={remat} attention={attention} "
        f"{'fits in' if fits else 'needs'} {size} of {limit / GiB:.2f}; compiled in {fit.seconds:.0f} s"
    )
    return fit


def best(e: Experiment, topology: Topology, say: Say) -> tuple[Fit | None, list[Fit]]:
    """The largest micro-batch under the least remat that fits, and everything that was tried.

    A larger micro-batch needs more memory, so the largest that fits is found by halving the choices.
    """
    setup = compilation.make_setup(dataclasses.replace(e, micro_rows="auto"), lambda _: None, topology.devices())
    choices, tried = compilation.micro_choices(setup)[::-1], list[Fit]()

    def attempt(rows: int, remat: str) -> Fit:
        tried.append(compiled(e, topology, rows, remat, say))
        return tried[-1]

    for remat in REMATS:
        found = attempt(choices[0], remat)
        if not found.fits:
            continue
        low, high = 0, len(choices)  # Of the choices, `low` fits and `high` does not.
        guess = max(i for i, rows in enumerate(choices) if rows <= choices[0] * topology.chip.memory / found.bytes)
        while high - low > 1:
            middle = min(max(guess, low + 1), high - 1)
            fit = attempt(choices[middle], remat)
            low, high = (middle, high) if fit.fits else (low, middle)
            found = fit if fit.fits else found
            guess = (low + high) // 2
        return found, tried
    return None, tried


def fit(e: Experiment, topology: Topology, say: Say) -> dict[str, Any]:
    """Whether the setting that is asked for fits, or else the best that does, with the command's flags.

    Raises:
        UserError: what is asked for does not fit; the message names the smallest change that does.
    """
    if e.dtype == "auto":
        e = dataclasses.replace(e, dtype="bfloat16")
    tried: list[Fit] = []
    if e.micro_rows != "auto":
        found: Fit | None = compiled(e, topology, e.micro_rows, e.model.remat, say)
        assert found is not None
        if not found.fits:
            raise refused(e, topology, best(e, topology, say)[0])
    else:
        found, tried = best(e, topology, say)
        if found is None:
            raise refused(e, topology, None)
    return {
        "fits": True,
        "exact": topology.exact,
        "micro_rows": found.micro_rows,
        "remat": found.remat,
        "attention": found.attention,
        "bytes_per_device": int(found.bytes),
        "limit": int(topology.chip.memory),
        "flags": f"--micro_rows={found.micro_rows} --model.remat={found.remat}",
        "tried": [dataclasses.asdict(one) for one in tried],
    }


def refused(e: Experiment, topology: Topology, found: Fit | None) -> UserError:
    """What is said of a setting that does not fit: the smallest change that does."""
    told = f"{e.name} does not fit {topology.name} with micro_rows={e.micro_rows} and model.remat={e.model.remat}"
    if found is not None:
        remat = "" if found.remat == e.model.remat else f" --model.remat={found.remat}"
        return UserError(f"{told}: set --micro_rows={found.micro_rows}{remat}")
    split = e.mesh.fsdp < topology.chips
    return UserError(
        f"{told}, nor with one row a device and remat=full: "
        + (
            f"set --mesh.fsdp={topology.chips}"
            if split
            else "name more chips, or a smaller --depth or --data.row_length"
        )
    )
