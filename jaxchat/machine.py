"""Resources of the machine that this process may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # Linux.
OWN = Path("/proc/self/cgroup")  # In version 2 a line such as 0::/user.slice; a container may see its own as the root.


def cores() -> int:
    """Number of processors for this process: its CPU affinity, limited by the quotas of its cgroups (rounded up)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for text in _limits("cpu.max"):  # Microseconds of processor time, or "max", and per how many.
        quota, period = text.split()
        count = count if quota == "max" else min(count, math.ceil(int(quota) / int(period)))
    return count


def memory() -> int:
    """Bytes of memory for this process: those of the machine, limited by its cgroups."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [*_limits("memory.max"), *_limits("memory/memory.limit_in_bytes")]  # Of version 2, and of version 1.
    return min([machine, *(int(text) for text in limits if text != "max")])


def _limits(name: str) -> Iterator[str]:
    """The content of this file in the cgroup of the process and in its parents, up to the root."""
    try:
        own = Path(OWN.read_text().strip().rpartition("::/")[2])
    except OSError:
        own = Path()
    for directory in (own, *own.parents):
        try:
            yield (CGROUPS / directory / name).read_text().strip()
        except OSError:
            continue
