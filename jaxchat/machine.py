"""Resources of the machine that this process may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # Linux; in version 1 each controller has a directory of its own.
OWN = Path("/proc/self/cgroup")  # Lines such as 0::/user.slice, or in version 1 4:memory:/user.slice.


def cores() -> int:
    """Number of processors for this process: its CPU affinity, limited by the quotas of its cgroups (rounded up)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for line in _limits("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):  # Microseconds of processor time, period.
        quota, period = [*line.split(), "100000"][:2]
        if quota.isdecimal() and period.isdecimal():
            count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


def memory() -> int:
    """Bytes of memory for this process: those of the machine, limited by its cgroups."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = _limits("memory.max", "memory.limit_in_bytes")
    return min([machine, *(int(line) for line in limits if line.isdecimal())])


def _limits(name: str, *older: str) -> Iterator[str]:
    """The content of a limit's file in every cgroup of this process, from the root to its own; `older` are the names of
    cgroups of version 1, whose contents are joined. A container may see its own cgroup as the root."""
    try:
        lines = [line.split(":", 2) for line in OWN.read_text().splitlines()]
    except OSError:
        lines = []
    controller = name.partition(".")[0]
    places = {(CGROUPS, (name,)), (CGROUPS / controller, older)}
    for _, controllers, path in lines:
        if not controllers or controller in controllers.split(","):
            root, names = (CGROUPS / controllers, older) if controllers else (CGROUPS, (name,))
            own = Path(path.lstrip("/"))
            places |= {(root / part, names) for part in (own, *own.parents)}
    for directory, names in places:
        try:
            yield " ".join((directory / file).read_text().strip() for file in names)
        except OSError:
            continue
