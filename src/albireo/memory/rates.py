"""How fast a step's parts are, as far as a placement has to know. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HOPPER", "Rates"]


@dataclass(frozen=True)
class Rates:
    """A machine's pace. All ranks, and all runs of one configuration, have to decide by the same numbers.

    Attributes:
        host_steps: parameters a second that the host steps.
        streamed_steps: parameters a second that the device steps whose states are streamed from the host and back.
        host_steps_beside: `host_steps` while states are streamed too: both drink from the host's memory.
        streamed_steps_beside: `streamed_steps` while the host steps too.
        device_steps: parameters a second that the device steps where their states are.
        bus_bytes: bytes a second from host memory to the device, or back; each way has its own.
    """

    host_steps: float
    streamed_steps: float
    host_steps_beside: float
    streamed_steps_beside: float
    device_steps: float
    bus_bytes: float


# One GPU of Hopper's kind with 16 cores of its host: measured there (docs/performance.md), and taken everywhere. Rates that
# a run would measure itself differ from run to run, and with them the side on which Adam runs, and with it the last bit.
HOPPER = Rates(
    host_steps=4.3e9,
    streamed_steps=3.8e9,
    host_steps_beside=3.0e9,
    streamed_steps_beside=2.3e9,
    device_steps=100e9,
    bus_bytes=55e9,
)
