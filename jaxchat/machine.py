"""The machine and the software of this process: processors it may use, versions, commit."""

import contextlib
import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")  # Linux.
OWN = Path("/proc/self/cgroup")  # In version 2 a line such as 0::/user.slice; a container may see its own as the root.
CPUINFO = Path("/proc/cpuinfo")
PACKAGES = "jaxchat jax jaxlib flax optax numpy libtpu jax-cuda12-plugin jax-cuda13-plugin torch transformers"


def cores() -> int:
    """Number of processors for this process: its CPU affinity, limited by the quotas of its cgroups (rounded up)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Microseconds of processor time, and per how many: of version 2 ("max" is no limit), and of version 1 (-1 is none).
    old = zip(_limits("cpu/cpu.cfs_quota_us"), _limits("cpu/cpu.cfs_period_us"))
    for quota, period in (*(text.split() for text in _limits("cpu.max")), *old):
        count = count if quota in ("max", "-1") else min(count, math.ceil(int(quota) / int(period)))
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


def surroundings() -> dict[str, Any]:
    """The commit of the code ("-changed" if files differ from it), the versions of Python and packages, the processor.

    `commit` is None where the code is not in a clone.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = ("git", "-C", str(Path(__file__).parent))
    own = output(*git, "ls-files", __file__)  # A clone of this code, not one that it was installed in.
    commit, changed = own and output(*git, "rev-parse", "HEAD"), output(*git, "status", "--porcelain")
    commit = commit and commit + "-changed" * bool(changed)
    processor = names[0] if names else platform.machine()
    return {"commit": commit, "versions": versions, "processor": processor, "cores": cores()}


def output(*command: str) -> str | None:
    """What a command prints; None if it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
