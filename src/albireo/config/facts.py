"""What the defaults of a run need to know about the machine."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MachineFacts"]


@dataclass(frozen=True)
class MachineFacts:
    """Facts that decide defaults.

    Attributes:
        device_type: "cuda" or "cpu".
        device_count: devices of that type that a rank of its own can have; a CPU takes any number of ranks.
        bf16_is_native: the device multiplies bf16 matrices in hardware.
    """

    device_type: str
    device_count: int
    bf16_is_native: bool
