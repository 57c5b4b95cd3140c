"""Time of calls, and of sides that take turns."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxchat.launcher import log


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the seconds it took."""
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def alternate(
    sides: Mapping[str, Callable[[], Any]], repeats: int, pause: float = 0.0
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Median seconds and all results of each side, called `repeats` times in turn, in alternating order, after a pause
    in seconds, in which the threads of the side before go to sleep."""
    found: dict[str, list[tuple[Any, float]]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: -1 if repeat % 2 else 1]:
            time.sleep(pause)
            found[name].append(timed(sides[name]))
        if pause:
            log(f"{repeat + 1}/{repeats}: " + ", ".join(f"{name} {found[name][-1][1]:.3g} s" for name in found))
    seconds = {name: spread([spent for _, spent in calls])["median"] for name, calls in found.items()}
    return seconds, {name: [result for result, _ in calls] for name, calls in found.items()}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and how many there are."""
    low, middle, high = map(float, np.quantile(seconds, (0.1, 0.5, 0.9)))
    return {"median": middle, "p10": low, "p90": high, "count": len(seconds)}
