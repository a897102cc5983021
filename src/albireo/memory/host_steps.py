"""Steps of chunks whose states are on the host: beside backward and the next forward, each waited for where it is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from albireo.device.lanes import Arrival, CopyLane
from albireo.device.watch import WorkLabel, waiting
from albireo.memory.chunk import Chunk
from albireo.memory.tracing.recorder import Recorder
from albireo.optim import HostStepper, Ticket
from albireo.sharding import Fragment

__all__ = ["HostSteps", "SentGradient"]

SentGradient = tuple[torch.Tensor, Arrival]
"""A gradient's place in host memory, and when it is there."""

# Chunks that the stepper has at a time: it works on one, and does not wait for the next. Those that come later may be
# wanted earlier.
_AHEAD = 2


class HostSteps:
    """Hands chunks to the host stepper, and waits for them one by one.

    A step is one ticket: the values of the optimizer's groups are copied when it is opened. Chunks may be handed over as
    their gradients leave, while backward still runs. Among those whose gradients have arrived, the one that the next
    forward needs first is stepped first; where none has, the one that was handed over first is.

    Args:
        stepper: steps the optimizer's parameters.
        lane: on which new weights go to chunks that are on the device.

    Attributes:
        watch: is told when chunks are stepped, and what waits for that; None: nobody looks.
    """

    def __init__(self, stepper: HostStepper, lane: CopyLane) -> None:
        self._stepper = stepper
        self._lane = lane
        self.watch: Recorder | None = None
        self._lock = threading.RLock()
        self._ticket: Ticket | None = None
        self._is_last = True
        self._fence: Arrival | None = None
        # Handed over, and not yet the stepper's: what of each is to be stepped.
        self._waiting: dict[Chunk, list[tuple[Fragment, SentGradient]]] = {}
        # By the index of its last item in the ticket.
        self._under_way: dict[int, Chunk] = {}
        self._unfinished: set[Chunk] = set()
        self._handed_over: set[Chunk] = set()

    @property
    def is_open(self) -> bool:
        """True if chunks can be handed over."""
        return not self._is_last

    def open(self, factor: float, *, fenced: bool) -> None:
        """Begin a step, when the one before is done. All values of the optimizer's groups are copied now.

        Args:
            factor: what gradients are multiplied by in fp32.
            fenced: chunks may be handed over whose weights kernels or copies that were launched before still read. Else
                their gradients come after all of these.
        """
        self.flush()
        if fenced:
            # A home must not be stepped while it is copied to the device.
            self._lane.follow()
            self._fence = self._lane.run(lambda: None)
        self._ticket = self._stepper.open(factor, on_done=self._done)
        self._is_last = False
        self._handed_over.clear()

    def has(self, chunk: Chunk) -> bool:
        """Return True if a chunk has been handed over in this step."""
        return chunk in self._handed_over

    def hand_over(
        self, chunk: Chunk, gradients: Callable[[Fragment], SentGradient | None], before: Callable[[Chunk], None]
    ) -> None:
        """Have a chunk stepped.

        Args:
            chunk: one of which nothing has been handed over in this step.
            gradients: returns a fragment's gradient; None: it is not stepped.
            before: called with it first.

        Raises:
            RuntimeError: it has been handed over; a gradient came after its chunk was complete.
        """
        with self._lock:
            if chunk in self._handed_over:
                raise RuntimeError(
                    "a gradient came when its weights had been handed over to be stepped: with reentrant checkpointing of a module that is "
                    "called twice, give --clip a bound, so that steps wait for the end of backward"
                )
            self._handed_over.add(chunk)
            found = [(fragment, gradients(fragment)) for fragment in chunk.fragments]
            items = [(fragment, sent) for fragment, sent in found if sent is not None]
            # Of a chunk that ranks share, any may step a part: what all have gathered is old on all.
            if items or chunk.ranks > 1:
                before(chunk)
            if items:
                # What reads the weights on the device was launched before.
                self._lane.follow()
                self._unfinished.add(chunk)
                self._waiting[chunk] = items
                self._feed()

    def seal(self) -> None:
        """Say that all chunks of the step have been handed over."""
        with self._lock:
            self._is_last = True
            self._seal_if_all_are_fed()

    def is_pending(self, chunk: Chunk) -> bool:
        """Return True if `wait_for` would block."""
        return chunk in self._unfinished

    def wait_for(self, chunk: Chunk) -> None:
        """Block until a chunk is stepped, if it is to be.

        Raises:
            Exception: what stopped the stepper.
        """
        if chunk in self._unfinished and self._ticket is not None:
            with waiting(self.watch, WorkLabel("host step", chunk)):
                self._ticket.wait_until(lambda: chunk not in self._unfinished)

    def flush(self) -> None:
        """Block until all are stepped.

        Raises:
            Exception: what stopped the stepper.
        """
        with waiting(self.watch if self._unfinished else None, WorkLabel("host step")):
            if self._ticket is not None:
                self._ticket.wait_until(lambda: not self._unfinished)
            if self._is_last:
                self._stepper.flush()

    def abandon(self) -> bool:
        """Forget what has not begun of a step that has failed, and finish the rest.

        Returns:
            True if chunks have been stepped of a step that was not handed over whole: weights are of two steps.

        Raises:
            Exception: what stopped the stepper.
        """
        if self._is_last:
            return False
        begun = bool(self._handed_over)
        with self._lock:
            self._waiting.clear()
            self._unfinished.intersection_update(self._under_way.values())
        self.seal()
        self.flush()
        return begun

    def close(self) -> None:
        """End the stepper's threads."""
        self._stepper.close()

    def _feed(self) -> None:
        """Give the stepper what it is to do next; called with the lock, by whoever hands over or reports."""
        while self._waiting and len(self._under_way) < _AHEAD and self._ticket is not None:
            arrived = [c for c, items in self._waiting.items() if all(arrival.has_run for _, (_, arrival) in items)]
            chunk = min(arrived, key=lambda c: c.number) if arrived else next(iter(self._waiting))
            items = self._waiting.pop(chunk)
            # Known before the item can be done.
            self._under_way[self._ticket.submitted + len(items) - 1] = chunk
            for fragment, (gradient, arrival) in items:
                output = None
                if chunk.home is not chunk.master:
                    output = chunk.home[fragment.cut.offset : fragment.cut.offset + fragment.cut.numel]
                ready = self._when_there(chunk, self._fence, arrival)
                self._fence = None
                self._ticket.submit(fragment.master, gradient, output=output, ready=ready)
        self._seal_if_all_are_fed()

    def _seal_if_all_are_fed(self) -> None:
        if self._is_last and not self._waiting and self._ticket is not None:
            self._ticket.seal()

    def _done(self, index: int) -> None:
        """An item is done; called by the stepper's thread."""
        with self._lock:
            chunk = self._under_way.get(index)
            if chunk is None:
                return
            # Where ranks share a chunk, the others' parts come with it, by a collective that all call in one order.
            if chunk.ranks == 1 and chunk.resident:
                label = WorkLabel("weights in", chunk, chunk.shard_bytes)
                chunk.arrival = self._lane.copy(chunk.partition, chunk.home, label)
                chunk.is_current = True
            watch = self.watch  # which the main thread may take away
            if watch is not None:
                watch.host_ends(chunk)
            del self._under_way[index]
            self._unfinished.discard(chunk)
            self._feed()

    def _when_there(self, chunk: Chunk, fence: Arrival | None, arrival: Arrival) -> Callable[[], object]:
        """Return what waits until a chunk's gradient may be read, and its weights written."""

        def wait() -> None:
            if fence is not None:
                fence.synchronize()
            arrival.synchronize()
            watch = self.watch  # which the main thread may take away
            if watch is not None:
                watch.host_begins(chunk)

        return wait
