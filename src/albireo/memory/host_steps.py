"""Steps of chunks whose states are on the host: beside the next forward, each waited for where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from albireo.device.lanes import Arrival, CopyLane
from albireo.memory.chunk import Chunk
from albireo.optim import HostStepper, Ticket
from albireo.sharding import Fragment

__all__ = ["HostSteps", "ReadyGradient"]

ReadyGradient = tuple[torch.Tensor, Callable[[], object] | None]
"""A gradient's place in host memory, and what waits until it is there."""


@dataclass(frozen=True)
class _Pending:
    """A chunk in a ticket: it is stepped once the item of this index is done."""

    ticket: Ticket
    last: int


class HostSteps:
    """Hands chunks to the host stepper, and waits for them one by one.

    Args:
        stepper: steps the optimizer's parameters.
        lane: on which new weights go to chunks that are on the device.
    """

    def __init__(self, stepper: HostStepper, lane: CopyLane) -> None:
        self._stepper = stepper
        self._lane = lane
        self._pending: dict[Chunk, _Pending] = {}

    def begin(
        self,
        chunks: Sequence[Chunk],
        gradients: Callable[[Fragment], ReadyGradient | None],
        factor: float,
        before: Callable[[Chunk], None],
    ) -> None:
        """Begin to step chunks. All values of the optimizer's groups are copied now.

        Args:
            chunks: in the order in which they are stepped.
            gradients: returns a fragment's gradient; None: it is not stepped.
            factor: what gradients are multiplied by in fp32.
            before: called before a chunk is handed over.
        """
        self.flush()
        stepped: list[tuple[Chunk, bool]] = []

        def done(index: int) -> None:
            chunk, is_last = stepped[index]
            # Where ranks share a chunk, the others' parts come with it, by a collective that all call in one order.
            if is_last and chunk.ranks == 1 and chunk.resident:
                chunk.arrival = self._lane.copy(chunk.partition, chunk.home)
                chunk.is_current = True

        # Kernels that still read the weights on the device come first, and so do the copies out of the homes that the
        # current stream has been ordered behind: a home must not be stepped while it is read.
        self._lane.follow()
        fence: Arrival | None = self._lane.run(lambda: None)
        with self._stepper.open(factor, on_done=done) as ticket:
            for chunk in chunks:
                found = [(fragment, gradients(fragment)) for fragment in chunk.fragments]
                items = [(fragment, gradient) for fragment, gradient in found if gradient is not None]
                # Of a chunk that ranks share, any may step a part: what all have gathered is old on all.
                if items or chunk.ranks > 1:
                    before(chunk)
                if not items:
                    continue
                last = -1
                for place, (fragment, (gradient, ready)) in enumerate(items):
                    stepped.append((chunk, place == len(items) - 1))
                    output = None
                    if chunk.home is not chunk.master:
                        output = chunk.home[fragment.cut.offset : fragment.cut.offset + fragment.cut.numel]
                    last = ticket.submit(fragment.master, gradient, output=output, ready=_both(fence, ready))
                    fence = None
                self._pending[chunk] = _Pending(ticket, last)

    def wait_for(self, chunk: Chunk) -> None:
        """Block until a chunk is stepped, if it is to be.

        Raises:
            Exception: what stopped the stepper.
        """
        pending = self._pending.get(chunk)
        if pending is not None:
            pending.ticket.wait_for(pending.last)
            del self._pending[chunk]

    def flush(self) -> None:
        """Block until all are stepped.

        Raises:
            Exception: what stopped the stepper.
        """
        self._stepper.flush()
        self._pending.clear()

    def close(self) -> None:
        """End the stepper's threads."""
        self._stepper.close()


def _both(fence: Arrival | None, ready: Callable[[], object] | None) -> Callable[[], object] | None:
    """Return what waits for both."""
    if fence is None:
        return ready

    def wait() -> None:
        fence.synchronize()
        if ready is not None:
            ready()

    return wait
