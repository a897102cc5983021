"""Numbers read from the device some steps late, so that the host never waits for the step it has just launched."""

from __future__ import annotations

from collections import deque

import torch

from albireo.device.clock import Moment

__all__ = ["Readback"]


class Readback:
    """A queue of small tensors on their way from the device to the host.

    The lag is counted in pushes, never in time: with collectives between, every rank must see the same number at the
    same step, or they would not agree on what to do with it.

    Args:
        device: where the tensors live.
        lag: how many younger tensors may be under way when one is read.
    """

    def __init__(self, device: torch.device, lag: int = 2) -> None:
        self._device = device
        self._lag = lag
        self._queue: deque[tuple[int, torch.Tensor, Moment]] = deque()

    def push(self, key: int, values: torch.Tensor) -> None:
        """Send a tensor on its way.

        Args:
            key: a number that comes back with it, such as the step.
            values: a small tensor on the device; not to be changed afterwards.
        """
        if self._device.type != "cuda":
            self._queue.append((key, values.detach().clone(), Moment(self._device)))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values.detach(), non_blocking=True)
        self._queue.append((key, host, Moment(self._device)))

    def pop(self, *, everything: bool = False) -> list[tuple[int, list[float], Moment]]:
        """Return the tensors that are old enough, waiting for those.

        Args:
            everything: also those that are younger than the lag.

        Returns:
            Key and values of each and the moment when the device had them, oldest first.
        """
        keep = 0 if everything else self._lag
        ready: list[tuple[int, list[float], Moment]] = []
        while len(self._queue) > keep:
            key, host, moment = self._queue.popleft()
            moment.wait()
            ready.append((key, host.tolist(), moment))
        return ready
