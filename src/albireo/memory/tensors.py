"""StatefulTensorManager: fetches chunks, lets them go, brings new weights home; the one file that moves their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from albireo.device.pool import DevicePool
from albireo.device.watch import WorkLabel
from albireo.distributed.collectives import all_gather_into
from albireo.memory.chunk import Chunk, Home, States
from albireo.memory.host_steps import HostSteps
from albireo.memory.placement import Placement
from albireo.memory.streamed_steps import StreamedSteps
from albireo.memory.tracing.recorder import Recorder

__all__ = ["StatefulTensorManager", "places_of"]


class StatefulTensorManager:
    """Holds chunks where they are to be, and knows what is to be waited for before one is read.

    Nothing here decides what stays: `Placement` does, and whoever sees the model's units begin and end calls.

    Args:
        chunks: all of them; a chunk's `number` is its place.
        pool: the device's memory.

    Attributes:
        chunks: the same.
        host_steps: what steps chunks on the host beside the rest; None: nothing does.
        streamed_steps: what streams states through the device; None: nothing does.
        half_stepped: a step failed when some weights had been stepped and others not: from then on they cannot be used.
        before_change: called before the memory that chunks take on the device changes.
        watch: is told when chunks come and go; None: nobody looks.
    """

    def __init__(self, chunks: Sequence[Chunk], pool: DevicePool) -> None:
        self.chunks = tuple(chunks)
        self.host_steps: HostSteps | None = None
        self.streamed_steps: StreamedSteps | None = None
        self.half_stepped = False
        self.before_change: Callable[[], None] | None = None
        self.watch: Recorder | None = None
        self._pool = pool
        # Weights on their way home, which keep their device memory until they are there.
        self._outgoing: dict[Chunk, torch.Tensor] = {}
        for chunk in self.chunks:
            chunk.on_publish = self._published

    def begin(self, chunk: Chunk) -> None:
        """Begin to fetch a chunk, if it is away or its weights are not the newest.

        Called in the same order on all ranks: it may be a collective.

        Raises:
            RuntimeError: weights are half stepped.
            Exception: what stopped the host stepper.
        """
        self._refuse_half_steps()
        if self.streamed_steps is not None:
            self._feed(self.streamed_steps, chunk)
        if chunk.is_current:
            return
        if self.host_steps is not None:
            # Raises what stopped the stepper. A chunk that is here has been filled by it.
            self.host_steps.wait_for(chunk)
        self._begin_old(chunk)

    def _feed(self, streamed: StreamedSteps, chunk: Chunk) -> None:
        """Have steps enqueued that are to be: those that this chunk waits for, and what keeps the pipeline busy."""
        streamed.wait_for(chunk)
        streamed.pump()
        if self.host_steps is not None and self.host_steps.is_pending(chunk):
            # The host is about to block.
            streamed.enqueue_all()

    def _begin_old(self, chunk: Chunk) -> None:
        if chunk.is_current:
            return
        if not chunk.is_here:
            self._changes()
            self._pool.take_back(chunk.compute)
            if self.watch is not None:
                self.watch.chunk_moves(chunk, here=True)
        self._wait_for_home(chunk)
        if chunk.home_place == "storage" and chunk.ranks == 1:
            chunk.is_current = True
            return
        lane = self._pool.to_device if chunk.home_place == "host" else self._pool.gather
        # The storage may have been another's whose kernels are not done; a home on the device has just been written.
        lane.follow()
        chunk.arrival = lane.run(lambda: _fill(chunk), WorkLabel("weights in", chunk, chunk.shard_bytes))
        chunk.is_current = True

    def use(self, chunk: Chunk) -> None:
        """See to it that a chunk's parameters can be read from here on."""
        self.begin(chunk)
        if chunk.arrival is not None:
            chunk.arrival.wait()
            chunk.arrival = None
        chunk.attach()

    def drop(self, chunk: Chunk) -> None:
        """Let a chunk's storage go, unless it is resident. Clean weights are dropped: home has them."""
        if chunk.resident or not chunk.is_here:
            return
        self._changes()
        if chunk.arrival is not None:
            # Somebody still writes into what is to be let go.
            chunk.arrival.wait()
            chunk.arrival = None
        chunk.detach()
        self._pool.let_go(chunk.compute)
        if self.watch is not None:
            self.watch.chunk_moves(chunk, here=False)
        chunk.is_current = False

    def stale(self, chunk: Chunk) -> None:
        """Say that a chunk's masters are about to be stepped on the host."""
        if chunk.arrival is not None:
            # Fetched and not used: the copy must not read what is stepped.
            chunk.arrival.synchronize()
            chunk.arrival = None
        chunk.count_change()
        chunk.is_current = False
        chunk.detach()

    def flush(self) -> None:
        """Wait until all steps are done and all weights are at home; chunks that never leave can be read then.

        Raises:
            RuntimeError: weights are half stepped.
            Exception: what stopped the stepper.
        """
        self._refuse_half_steps()
        if self.host_steps is not None:
            if self.streamed_steps is not None:
                self.streamed_steps.enqueue_all()
            self.host_steps.flush()
        if self.streamed_steps is not None:
            self.streamed_steps.flush()
        for chunk in self.chunks:
            self._wait_for_home(chunk)
            if chunk.resident and chunk.ranks == 1:
                self.use(chunk)

    def _refuse_half_steps(self) -> None:
        if self.half_stepped or (self.streamed_steps is not None and self.streamed_steps.has_failed):
            raise RuntimeError(
                "a step failed when some weights had been stepped and others not, so this model and optimizer cannot be used "
                "any more: boost again, and load a checkpoint"
            )

    def apply(self, placement: Placement, optimizer: torch.optim.Optimizer | None) -> list[Chunk]:
        """Move states and homes to where a placement has them.

        Args:
            placement: where to.
            optimizer: whose states they are.

        Returns:
            The chunks whose states came to the device.
        """
        self.flush()
        # Host memory is let go of below: no copy may still read it or write it.
        for lane in (self._pool.to_device, self._pool.to_host, self._pool.gather):
            lane.drain()
        came = []
        # What leaves goes first, so that there is room for what comes.
        for chunk in sorted(self.chunks, key=lambda chunk: chunk.number in placement.states_on_device):
            resident = chunk.number in placement.resident
            states, home = places_of(chunk, resident=resident, on_device=chunk.number in placement.states_on_device)
            if states == "device" and chunk.states_place == "host" and chunk.trained:
                came.append(chunk)
            chunk.resident = resident
            self._changes()
            streams = chunk.number in placement.streamed
            if chunk.streams and not streams and self.streamed_steps is not None:
                self.streamed_steps.forget(chunk)
            chunk.place(states, home, optimizer, streams=streams)
            if resident:
                # The host stepper writes into it.
                self._pool.take_back(chunk.compute)
            else:
                self.drop(chunk)
        if not placement.streamed:
            # With its ring.
            self.streamed_steps = None
        return came

    def _published(self, chunk: Chunk) -> None:
        """Weights were stepped where the computing is."""
        if chunk.writes_back:
            self._wait_for_home(chunk)
            narrow = chunk.master.to(chunk.dtype, copy=True)
            self._pool.to_host.follow()
            label = WorkLabel("weights home", chunk, chunk.shard_bytes)
            chunk.home_arrival = self._pool.to_host.copy(chunk.home, narrow, label)
            self._outgoing[chunk] = narrow
        chunk.is_current = chunk.home_place == "storage" and chunk.ranks == 1 and chunk.is_here
        if not chunk.is_current and chunk.is_attached:
            chunk.detach()

    def _wait_for_home(self, chunk: Chunk) -> None:
        if chunk.home_arrival is not None:
            chunk.home_arrival.wait()
            chunk.home_arrival = None
            self._outgoing.pop(chunk, None)

    def _changes(self) -> None:
        if self.before_change is not None:
            self.before_change()


class _Sizes(Protocol):
    """A chunk, or what is known of one before it is made."""

    @property
    def trained(self) -> bool: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def ranks(self) -> int: ...


def places_of(chunk: _Sizes, *, resident: bool, on_device: bool) -> tuple[States, Home]:
    """Return where masters and home of a chunk are to be.

    Args:
        chunk: which.
        resident: its weights never leave the device.
        on_device: its states are stepped there.
    """
    if not chunk.trained:
        # Nothing steps them: their masters are on the host, unless what never leaves is in fp32 itself.
        if resident:
            return ("host" if chunk.dtype in (torch.float16, torch.bfloat16) else "device"), "storage"
        return "host", "host"
    if not on_device:
        return "host", "host"
    if resident:
        return "device", "storage"
    return "device", ("host" if chunk.ranks == 1 else "device")


def _fill(chunk: Chunk) -> None:
    """Fill a chunk's storage on a lane."""
    if chunk.home_place != "storage":
        chunk.partition.copy_(chunk.home, non_blocking=True)
    if chunk.ranks > 1:
        all_gather_into(chunk.compute, chunk.partition).wait()
