"""The largest micro-batch that fits, in few compilations."""

import bisect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxchat import compilation, devices
from jaxchat.benchmarks.accelerator.timing import Compiled, compiling
from jaxchat.compilation import Setup
from jaxchat.errors import UserError
from jaxchat.launcher import log

# Numbers of `width` that a layer keeps of each token for the backward pass, about: only the first guess needs them.
KEPT = {"none": 40, "dots": 20, "attention": 6, "full": 2}
MARGIN = 1.02


class Fitted(NamedTuple):
    """A compiled step, rows of its micro-batch, bytes of a device by the compiler, cost, and every size tried."""

    step: Any
    rows: int
    bytes: float
    compiled: Compiled
    tried: dict[int, float]


def fit(setup: Setup, *, tries: int, most: int = 0) -> Fitted:
    """The largest micro-batch that is found to fit within `tries` compilations; at most `most` rows.

    Memory grows with the rows, so that a compiled size tells how large the next one may be. While nothing fits, the
    search goes on beyond `tries`.

    Raises:
        UserError: not even the smallest fits.
    """
    device = setup.mesh.devices.flat[0]
    limit = compilation.MEMORY_SHARE * devices.memory_limit(device)
    if (state := compilation.state_bytes(setup)) > limit:
        raise UserError(
            f"the training state alone needs {state / 2**30:.1f} GiB of a device's {limit / 2**30:.1f}: split it over "
            "several with --mesh.fsdp, or name smaller --depths"
        )
    choices = [rows for rows in compilation.micro_choices(setup)[::-1] if not most or rows <= most]
    fixed, per_row = fixed_bytes(setup), row_bytes(setup)
    found: Fitted | None = None
    tried: dict[int, float] = {}
    low, high = -1, len(choices)  # Of the choices, `low` fits and `high` does not.
    at = at_most(choices, (limit - fixed) / per_row)
    while low < at < high and (found is None or len(tried) < tries):
        rows = choices[at]
        step, needed, compiled = compile_rows(setup, rows)
        tried[rows] = needed
        fits = step is not None and needed <= limit
        log(f"micro_rows={rows} {'fits in' if fits else 'needs'} {needed / 2**30:.2f} GiB of {limit / 2**30:.2f}")
        if fits:
            low, found = at, Fitted(step, rows, needed, compiled, tried)
        else:
            high = at
        guess = at - 1
        if needed < math.inf:
            per_row = max(needed - fixed, 1) / rows * MARGIN
            guess = at_most(choices, (limit - fixed) / per_row)
        at = max(guess, low + 1) if found is None else guess
        at = min(at, high - 1)
    if found is None:
        least = min(tried.values(), default=math.inf)
        raise UserError(
            f"no micro-batch of {', '.join(map(str, tried))} rows fits: {least / 2**30:.1f} GiB are needed at least, "
            f"and a device may use {limit / 2**30:.1f}"
        )
    return found


def at_most(choices: Sequence[int], rows: float) -> int:
    """The index of the largest choice that is no more than `rows`, of the smallest where none is."""
    return max(0, bisect.bisect_right(choices, rows) - 1)


def compile_rows(setup: Setup, rows: int) -> tuple[Any, float, Compiled]:
    """The step for micro-batches of `rows`, the bytes of a device (step None: too many), the cost."""
    with compiling() as compiled:
        step, needed = compilation.compile_lowered(compilation.lower_step(setup, rows), setup, log)
    return step, needed, compiled


def out_of_memory(error: BaseException) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def fixed_bytes(setup: Setup) -> float:
    """Bytes of a device that do not depend on the micro-batch: the state, and a gradient."""
    return compilation.state_bytes(setup) + compilation.held_bytes(setup.abstract.params)


def row_bytes(setup: Setup) -> float:
    """Bytes of a device for a row of a micro-batch, about."""
    e, c, size = setup.experiment, setup.experiment.model, setup.transformer.dtype.itemsize
    T, heads = e.data.row_length, c.pattern[0].heads
    kept = KEPT[c.remat] * T * c.width * c.depth * size
    if setup.transformer.attention == "xla":  # It keeps the weights of every layer, or of the one that it recomputes.
        kept += heads * T * T * size * (c.depth if c.remat in ("none", "dots") else 4)
    return kept / (setup.mesh.shape["data"] * setup.mesh.shape["fsdp"])
