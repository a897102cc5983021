"""How many cores of the host this process may really compute on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from albireo.device.cgroups import cgroup_folders

__all__ = ["usable_cores"]


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many threads that compute are worth having in this process and its children.

    It is the number of physical cores among those the process may run on (a second thread on a core that computes has
    nothing left to use), or what a container's quota of processor time amounts to, if that is less.

    Args:
        root: where `proc` and `sys` are; another one in tests.
    """
    logical = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, min([_physical(logical, root), *(int(quota) for quota in _quotas(root))]))


def _physical(logical: Iterable[int], root: Path) -> int:
    """Return how many cores the logical processors share; each is its own where the system does not say."""
    cores = set()
    for processor in logical:
        siblings = root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(f"cpu{processor}")
    return len(cores)


def _quotas(root: Path) -> list[float]:
    """Return the quotas of all groups, in cores."""
    quotas = []
    for group, version in cgroup_folders("cpu", root):
        try:
            if version == 2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota = (group / "cpu.cfs_quota_us").read_text().strip()
                period = (group / "cpu.cfs_period_us").read_text().strip()
        except (OSError, ValueError):
            continue
        # A group without a quota says "max" (version 2) or -1 (version 1).
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return quotas
