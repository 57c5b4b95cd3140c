"""Resources of the machine that this process may use."""

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # Linux, cgroup v2: microseconds of processor time per period, or "max".


def cores() -> int:
    """Number of processors for this process: its CPU affinity, limited by the quota of its cgroup (rounded up)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        return count
