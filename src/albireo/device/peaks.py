"""The only reader of peak memory counters. Nothing else resets them, so that what a run reports is its true peak."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["PeakMemory", "PeakReading"]


@dataclass(frozen=True)
class PeakReading:
    """Memory at one moment, in bytes.

    Attributes:
        device_bytes: allocated on the device now; 0 on a CPU.
        device_reserved_bytes: held by torch's allocator now, its unused blocks included; 0 on a CPU.
        device_peak_bytes: most that was allocated on the device since the last reset; 0 on a CPU.
        device_reserved_peak_bytes: most that torch's allocator held, its unused blocks included; 0 on a CPU.
        host_bytes: the process's resident memory now; 0 where the system does not say.
        host_peak_bytes: the process's largest resident memory so far.
    """

    device_bytes: int
    device_peak_bytes: int
    device_reserved_peak_bytes: int
    host_peak_bytes: int
    device_reserved_bytes: int = 0
    host_bytes: int = 0


class PeakMemory:
    """Reads the peaks of one device and of this process.

    Args:
        device: the device of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self) -> PeakReading:
        """Return the peaks so far; never waits for the device."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if self._device.type != "cuda":
            return PeakReading(0, 0, 0, host, host_bytes=_resident_bytes())
        # torch's functions for a single counter each have the allocator write down all of them.
        counters = torch.cuda.memory_stats(self._device)
        return PeakReading(
            device_bytes=counters.get("allocated_bytes.all.current", 0),
            device_peak_bytes=counters.get("allocated_bytes.all.peak", 0),
            device_reserved_peak_bytes=counters.get("reserved_bytes.all.peak", 0),
            host_peak_bytes=host,
            device_reserved_bytes=counters.get("reserved_bytes.all.current", 0),
            host_bytes=_resident_bytes(),
        )

    def reset(self) -> None:
        """Start the device's peak anew; the host's cannot be."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # no Linux
        return 0
    return pages * resource.getpagesize()
