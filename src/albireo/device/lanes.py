"""Lanes: where copies run beside the computing; a GPU's are streams. The simulated ones are in `simulated_lane`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from albireo.device.watch import LaneWatch, WorkLabel, at_work, waiting

__all__ = ["Arrival", "CopyLane", "CudaLane", "ImmediateLane", "check_shapes", "copy_lane"]


class Arrival(ABC):
    """When something on a lane has run. It may be waited for any number of times, or by nobody."""

    @abstractmethod
    def wait(self) -> None:
        """Order the current stream behind it; on a GPU the host does not wait.

        Raises:
            Exception: on a lane that runs things late, what they raised.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until it has run; any thread may.

        Raises:
            Exception: as `wait`.
        """

    @property
    @abstractmethod
    def has_run(self) -> bool:
        """True if nothing is left to wait for; any thread may ask."""


class CopyLane(ABC):
    """Runs copies, and what belongs to them, in the order in which they are enqueued. Any thread may enqueue.

    Nothing here is recorded for autograd.

    Attributes:
        watch: is told of works that have a label, and of waits for them; None: nobody looks.
    """

    watch: LaneWatch | None = None

    @abstractmethod
    def follow(self) -> None:
        """Have all that is enqueued from now on run after what the current stream was given so far.

        It stands before the lane reads what the current stream made, and before it writes into memory that came from
        the current stream's part of the allocator: kernels may still be reading what lay there before.
        """

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, label: WorkLabel | None = None) -> Arrival:
        """Enqueue a copy; dtypes may differ. From here to the arrival nobody may read the target or write the source.

        The caller keeps the arrival until it has waited for it, and with that both tensors, which the arrival holds: a
        stream of its own does not tell the allocator what it still uses, so memory that is let go of before is given
        to others while the copy runs. In return memory comes back at one place of the program, the same in every run.

        A cast on a GPU is made there, and takes a temporary buffer of the lane's own part of the allocator.

        Args:
            target: of the source's shape.
            source: host memory is page-locked, or the host waits after all.
            label: what it is, for whoever looks.

        Raises:
            ValueError: the shapes differ.
        """

    @abstractmethod
    def run(self, function: Callable[[], object], label: WorkLabel | None = None) -> Arrival:
        """Enqueue any function, such as a copy that a collective follows. The arrival holds it, as that of a copy does.

        Args:
            function: on a GPU it is called at once, with the lane as the current stream; on a simulated lane when
                somebody waits, on the thread that does.
            label: what it is, for whoever looks.
        """

    @abstractmethod
    def running(self) -> AbstractContextManager[object]:
        """Return a context whose code runs on the lane.

        Raises:
            RuntimeError: the lane is a simulated one, which can run functions late, but not a caller's code.
        """

    @abstractmethod
    def drain(self) -> None:
        """Block the host until all that was enqueued has run.

        Raises:
            Exception: the first that something raised which nobody has waited for.
        """


class CudaLane(CopyLane):
    """A stream of its own, for life.

    Args:
        device: the GPU.
        priority: of the stream's kernels; lower numbers go first.

    Attributes:
        device: the GPU.
        stream: the lane's.
    """

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        """Put the stream behind the current one."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, target: torch.Tensor, source: torch.Tensor, label: WorkLabel | None = None) -> Arrival:
        """Enqueue a copy."""
        check_shapes(target, source)
        home = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream), torch.no_grad(), at_work(self.watch, label):
            target.copy_(source, non_blocking=True)
        return _CudaArrival(self, home, (target, source), label)

    def run(self, function: Callable[[], object], label: WorkLabel | None = None) -> Arrival:
        """Call a function with the lane as the current stream."""
        home = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream), torch.no_grad(), at_work(self.watch, label):
            function()
        return _CudaArrival(self, home, function, label)

    def running(self) -> AbstractContextManager[object]:
        """Make the lane the current stream."""
        return torch.cuda.stream(self.stream)

    def drain(self) -> None:
        """Wait for the stream."""
        self.stream.synchronize()


class _CudaArrival(Arrival):
    """An event on a lane.

    Args:
        lane: which.
        home: the stream that was current when the work was enqueued: memory goes back to that one's.
        kept: what has to live until `home` is behind the event, or the host has seen it.
        label: what it is, for whoever looks.
    """

    def __init__(self, lane: CudaLane, home: torch.cuda.Stream, kept: object, label: WorkLabel | None) -> None:
        self._lane = lane
        self._home = home
        self._kept: object = kept
        self._label = label
        # A thread of the host that waits sleeps: spinning it would take a core from those that step.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(lane.stream)

    def wait(self) -> None:
        current = torch.cuda.current_stream(self._lane.device)
        # Another stream's wait is not the computing's, and nothing waits for what has run.
        watch = self._lane.watch
        if watch is not None and (current != self._home or self.has_run):
            watch = None
        with waiting(watch, self._label):
            current.wait_event(self._event)
        if current == self._home:
            self._kept = None

    def synchronize(self) -> None:
        self._event.synchronize()
        self._kept = None

    @property
    def has_run(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class ImmediateLane(CopyLane):
    """A plain CPU, which has one stream: all is done at once. There is nothing to watch: nobody waits."""

    def follow(self) -> None:
        """Do nothing: what came before is done."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, label: WorkLabel | None = None) -> Arrival:  # noqa: ARG002
        """Copy."""
        check_shapes(target, source)
        with torch.no_grad():
            target.copy_(source)
        return _Arrived()

    def run(self, function: Callable[[], object], label: WorkLabel | None = None) -> Arrival:  # noqa: ARG002
        """Call a function."""
        with torch.no_grad():
            function()
        return _Arrived()

    def running(self) -> AbstractContextManager[object]:
        """Return a context that changes nothing."""
        return nullcontext()

    def drain(self) -> None:
        """Do nothing: all is done."""


class _Arrived(Arrival):
    """An arrival of what is done."""

    def wait(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    @property
    def has_run(self) -> bool:
        return True


def check_shapes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Refuse a copy between tensors of different shapes.

    Raises:
        ValueError: they are.
    """
    if target.shape != source.shape:
        raise ValueError(f"a copy of shape {tuple(source.shape)} does not fit a target of {tuple(target.shape)}")


def copy_lane(device: torch.device) -> CopyLane:
    """Return a lane of a device's own: a stream of a GPU; a CPU's copies are done at once.

    Args:
        device: what copies go to or come from.
    """
    return CudaLane(device) if device.type == "cuda" else ImmediateLane()
