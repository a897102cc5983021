"""How much of the host's memory may be used, as far as the system says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from albireo.device.cgroups import cgroup_folders
from albireo.device.memory import read_host_memory

__all__ = ["HostMemoryReading", "probe_host_memory"]

# A cgroup of version 1 without a limit says a number near 2**63.
_NO_LIMIT_BYTES = 2**60
_GROUP_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}


@dataclass(frozen=True)
class HostMemoryReading:
    """The host's memory at one moment, in bytes; None where the system does not say.

    Attributes:
        usable_bytes: the least of all limits: what this process may use at most, as far as the system says.
        limited_by: "machine" or "cgroup".
        total_bytes: MemTotal.
        available_bytes: MemAvailable: what can be had without swapping.
        cgroup_limit_bytes: the least limit of a group that this process is in.
        cgroup_used_bytes: what that group uses, without the files it keeps in memory.
        swap_used_bytes: what lies in swap.
        stalled_seconds: time since the start of the system in which all work waited for memory.
    """

    usable_bytes: int | None
    limited_by: str | None
    total_bytes: int | None
    available_bytes: int | None
    cgroup_limit_bytes: int | None
    cgroup_used_bytes: int | None
    swap_used_bytes: int | None
    stalled_seconds: float | None


def probe_host_memory(root: Path = Path("/")) -> HostMemoryReading:
    """Read what the system says.

    Args:
        root: where `proc` and `sys` are; another one in tests.
    """
    memory = read_host_memory(root)
    info = _meminfo(root)
    limit, used = _tightest_group(root)
    swap = (info["SwapTotal"] - info["SwapFree"]) if {"SwapTotal", "SwapFree"} <= set(info) else None
    return HostMemoryReading(
        usable_bytes=memory.total_bytes if memory else None,
        limited_by=memory.limited_by if memory else None,
        total_bytes=info.get("MemTotal"),
        available_bytes=info.get("MemAvailable"),
        cgroup_limit_bytes=limit,
        cgroup_used_bytes=used,
        swap_used_bytes=swap,
        stalled_seconds=_stalled(root),
    )


def _meminfo(root: Path) -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    info = {}
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            words = value.split()
            if words and words[0].isdigit():
                info[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    except OSError:
        return {}
    return info


def _tightest_group(root: Path) -> tuple[int | None, int | None]:
    """Return limit and use of the group that has the least left; a group without a limit does not count."""
    tightest: tuple[int, int] | None = None
    for group, version in cgroup_folders("memory", root):
        limit_name, used_name = _GROUP_FILES[version]
        limit, used = _number(group / limit_name), _number(group / used_name)
        if limit is None or used is None or limit >= _NO_LIMIT_BYTES:
            continue
        used = max(0, used - _file_pages(group))
        if tightest is None or limit - used < tightest[0] - tightest[1]:
            tightest = (limit, used)
    return tightest or (None, None)


def _file_pages(group: Path) -> int:
    """Return the bytes of files that a group keeps in memory and can let go of; version 1 has them with its children's."""
    try:
        lines = dict(line.split(maxsplit=1) for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    names = (
        ("total_inactive_file", "total_active_file")
        if "total_inactive_file" in lines
        else ("inactive_file", "active_file")
    )
    return sum(int(lines.get(name, 0)) for name in names)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stalled(root: Path) -> float | None:
    try:
        lines = (root / "proc/pressure/memory").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        kind, *words = line.split()
        totals = [word.removeprefix("total=") for word in words if word.startswith("total=")]
        if kind == "full" and totals and totals[0].isdigit():
            return int(totals[0]) / 1e6
    return None
