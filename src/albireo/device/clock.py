"""Moments on the device's own clock, which nobody has to wait for."""

from __future__ import annotations

import time

import torch

__all__ = ["Moment"]


class Moment:
    """When the device came to this point of its work; on a CPU, now.

    Args:
        device: whose clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> None:
        """Wait until the device has come there."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Return the seconds between two moments of one device; both must have come.

        Args:
            earlier: the first of the two.
        """
        if self._event is not None and earlier._event is not None:
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._seconds - earlier._seconds
