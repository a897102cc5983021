"""The only reader of peak memory counters. Nothing else resets them, so that what a run reports is its true peak."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch

__all__ = ["PeakMemory", "PeakReading"]


@dataclass(frozen=True)
class PeakReading:
    """Memory at one moment, in bytes.

    Attributes:
        device_bytes: allocated on the device now; 0 on a CPU.
        device_peak_bytes: most that was allocated on the device since the last reset; 0 on a CPU.
        device_reserved_peak_bytes: most that torch's allocator held, its unused blocks included; 0 on a CPU.
        host_peak_bytes: the process's largest resident memory so far.
    """

    device_bytes: int
    device_peak_bytes: int
    device_reserved_peak_bytes: int
    host_peak_bytes: int


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
            return PeakReading(0, 0, 0, host)
        # torch's functions for a single counter each have the allocator write down all of them.
        counters = torch.cuda.memory_stats(self._device)
        return PeakReading(
            device_bytes=counters.get("allocated_bytes.all.current", 0),
            device_peak_bytes=counters.get("allocated_bytes.all.peak", 0),
            device_reserved_peak_bytes=counters.get("reserved_bytes.all.peak", 0),
            host_peak_bytes=host,
        )

    def reset(self) -> None:
        """Start the device's peak anew; the host's cannot be."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
