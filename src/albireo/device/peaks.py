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

    torch has one counter of each peak, and starting it anew is the only way to measure a part of a run. What was
    counted before is kept here: whoever measures parts and whoever reports the whole share one object (a run takes its
    plugin's, `Plugin.peaks`).

    Args:
        device: the device of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # The peaks that torch has forgotten: of the whole, and of the interval that goes on.
        self._peak_bytes = 0
        self._reserved_peak_bytes = 0
        self._interval_bytes = 0

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self._device

    def read(self) -> PeakReading:
        """Return the peaks since the last reset, intervals or not; never waits for the device."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if self._device.type != "cuda":
            return PeakReading(0, 0, 0, host, host_bytes=_resident_bytes())
        # torch's functions for a single counter each have the allocator write down all of them.
        counters = torch.cuda.memory_stats(self._device)
        return PeakReading(
            device_bytes=counters.get("allocated_bytes.all.current", 0),
            device_peak_bytes=max(self._peak_bytes, counters.get("allocated_bytes.all.peak", 0)),
            device_reserved_peak_bytes=max(self._reserved_peak_bytes, counters.get("reserved_bytes.all.peak", 0)),
            host_peak_bytes=host,
            device_reserved_bytes=counters.get("reserved_bytes.all.current", 0),
            host_bytes=_resident_bytes(),
        )

    def interval_peak_bytes(self) -> int:
        """Return the most allocated on the device since the last such call, and begin the next interval; 0 on a CPU.

        The first interval begins with the process. The peak of the whole goes on.
        """
        if self._device.type != "cuda":
            return 0
        self._fold()
        peak, self._interval_bytes = self._interval_bytes, 0
        return peak

    def reset(self) -> None:
        """Start the device's peak anew; the host's cannot be. An interval goes on."""
        if self._device.type == "cuda":
            self._fold()
            self._peak_bytes = self._reserved_peak_bytes = 0

    def _fold(self) -> None:
        """Keep what torch's counters say, and start them anew from what is allocated now."""
        counters = torch.cuda.memory_stats(self._device)
        peak = counters.get("allocated_bytes.all.peak", 0)
        self._interval_bytes = max(self._interval_bytes, peak)
        self._peak_bytes = max(self._peak_bytes, peak)
        self._reserved_peak_bytes = max(self._reserved_peak_bytes, counters.get("reserved_bytes.all.peak", 0))
        torch.cuda.reset_peak_memory_stats(self._device)


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # no Linux
        return 0
    return pages * resource.getpagesize()
