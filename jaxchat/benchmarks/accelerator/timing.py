"""Time of a device that works while Python goes on: queues are filled as in training, and waited for."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.monitoring
import numpy as np

from jaxchat.benchmarks.accelerator.report import Clock

QUEUE_SECONDS = 0.02  # Work that is dispatched before it is waited for: much more than a dispatch takes.
MOST_QUEUED = 16
LEAST_STEPS = 3


def quantiles(seconds: Sequence[float], *, scale: float = 1e3) -> dict[str, float]:
    """Median, 10th and 90th percentile, in milliseconds unless `scale` says otherwise."""
    low, middle, high = (float(q) * scale for q in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return {"median": round(middle, 5), "p10": round(low, 5), "p90": round(high, 5), "count": len(seconds)}


def time_call(call: Callable[[], Any], *, repeats: int) -> list[float]:
    """Seconds of one call, measured `repeats` times after two that warm up; `call` returns arrays.

    Several calls are dispatched before the first is waited for, which hides the dispatch where the device is slower.
    """
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    queued = int(min(MOST_QUEUED, max(1, QUEUE_SECONDS / (time.perf_counter() - start))))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(queued)])
        seconds.append((time.perf_counter() - start) / queued)
    return seconds


@dataclass
class StepTimes:
    """Seconds of each measured step from the end of the one before, seconds until its dispatch returned, losses."""

    seconds: list[float]
    dispatch: list[float]
    losses: list[float]


def time_steps(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batches: Sequence[Any],
    *,
    steps: int,
    clock: Clock,
    warm: int = 2,
) -> StepTimes:
    """Trains as `fit` does: a step's metrics are fetched after the next one is dispatched. The state is used up.

    Steps that would not end in time are left out, but for the first few.
    """
    told = StepTimes([], [], [])
    waiting, before = None, time.perf_counter()
    for i in range(warm + steps + 1):
        median = float(np.median(told.seconds)) if told.seconds else 0.0
        last = i == warm + steps or (len(told.seconds) >= LEAST_STEPS and clock.left() < 2 * median)
        start = time.perf_counter()
        fresh = None
        if not last:
            state, fresh = step(state, batches[i % len(batches)])
            dispatch = time.perf_counter() - start
        if waiting is not None:
            loss = float(jax.device_get(waiting["loss"]))
            now = time.perf_counter()
            if i > warm:
                told.seconds.append(now - before)
                told.losses.append(loss)
            before = now
        if last:
            break
        if i >= warm:
            told.dispatch.append(dispatch)
        waiting = fresh
    jax.block_until_ready(state)
    return told


@dataclass
class Compiled:
    """What compiling cost: seconds here, whether every program came from the cache, and seconds without one."""

    seconds: float = 0.0
    cached: bool = False
    cold_seconds: float = 0.0


@contextlib.contextmanager
def compiling() -> Iterator[Compiled]:
    """Measures what is compiled inside."""
    found, asked, hits, saved = Compiled(), 0, 0, 0.0

    def count(event: str, **_: Any) -> None:
        nonlocal asked, hits
        asked += event == "/jax/compilation_cache/compile_requests_use_cache"
        hits += event == "/jax/compilation_cache/cache_hits"

    def add(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal saved
        saved += duration_secs if event == "/jax/compilation_cache/compile_time_saved_sec" else 0.0

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(add)
    start = time.perf_counter()
    try:
        yield found
    finally:
        found.seconds = time.perf_counter() - start
        found.cached = 0 < hits == asked
        found.cold_seconds = found.seconds + saved
        jax.monitoring.unregister_event_listener(count)
        jax.monitoring.unregister_event_duration_listener(add)
