"""How much memory there is: the device's, and the host's as its cgroup really allows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from albireo.device.cgroups import cgroup_folders

__all__ = ["HostMemory", "device_total_bytes", "host_room_bytes", "read_host_memory"]

# A cgroup without a limit says "max" (v2) or a number near 2**63 (v1).
_NO_LIMIT_BYTES = 2**60
# What the room leaves of the whole: the system, and the files that it keeps in memory while they are read and written.
_RESERVE_SHARE = 0.05
_RESERVE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class HostMemory:
    """What the operating system says of the host's memory.

    Attributes:
        total_bytes: what this process may use at most: the machine's memory or its cgroup's limit.
        limited_by: "cgroup" or "machine".
    """

    total_bytes: int
    limited_by: str


def device_total_bytes(device: torch.device) -> int | None:
    """Return the device's memory in bytes, or None for a CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def read_host_memory(root: Path = Path("/")) -> HostMemory | None:
    """Return the host's memory as this process may use it, or None where the system does not say.

    Args:
        root: where `proc` and `sys` are; another one in tests.
    """
    total = _meminfo_total(root / "proc/meminfo")
    limit = min(_cgroup_limits(root), default=_NO_LIMIT_BYTES)
    if limit < _NO_LIMIT_BYTES and (total is None or limit < total):
        return HostMemory(limit, "cgroup")
    return None if total is None else HostMemory(total, "machine")


def host_room_bytes(cap_bytes: int | None, ranks_here: int, root: Path = Path("/")) -> int | None:
    """Return what one rank may take of the host's memory in all, what it holds already included.

    Without a cap it is its share of the cgroup's limit, wherever there is one, else of MemTotal, less 5% and at most 4
    GB that are left to the system. The limit counts even where MemTotal is less: there are machines that get memory as
    they touch it, and say little before. On one of those without a limit only the user knows, and gives a cap.

    Args:
        cap_bytes: what all ranks of this machine may take together; None or 0: what there is.
        ranks_here: how many they are.
        root: where `proc` and `sys` are; another one in tests.

    Returns:
        Bytes, or None where the system does not say.
    """
    if cap_bytes:
        return cap_bytes // ranks_here
    whole = min(_cgroup_limits(root), default=_meminfo_total(root / "proc/meminfo"))
    if whole is None:
        return None
    return (whole - min(_RESERVE_BYTES, int(_RESERVE_SHARE * whole))) // ranks_here


def _meminfo_total(path: Path) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _cgroup_limits(root: Path) -> list[int]:
    """Return the limits of every group this process is in."""
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    limits = (_read_limit(group / names[version]) for group, version in cgroup_folders("memory", root))
    return [limit for limit in limits if limit is not None]


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT_BYTES else None
