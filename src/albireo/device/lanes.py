"""Lanes: where copies run beside the computing, on a GPU's stream or, on a laptop, as late as their events allow."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["Arrival", "CopyLane", "CudaLane", "ImmediateLane", "SimulatedLane", "copy_lane"]


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
    """

    @abstractmethod
    def follow(self) -> None:
        """Have all that is enqueued from now on run after what the current stream was given so far.

        It stands before the lane reads what the current stream made, and before it writes into memory that came from
        the current stream's part of the allocator: kernels may still be reading what lay there before.
        """

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Arrival:
        """Enqueue a copy; dtypes may differ. From here to the arrival nobody may read the target or write the source.

        The caller keeps the arrival until it has waited for it, and with that both tensors, which the arrival holds: a
        stream of its own does not tell the allocator what it still uses, so memory that is let go of before is given
        to others while the copy runs. In return memory comes back at one place of the program, the same in every run.

        A cast on a GPU is made there, and takes a temporary buffer of the lane's own part of the allocator.

        Args:
            target: of the source's shape.
            source: host memory is page-locked, or the host waits after all.

        Raises:
            ValueError: the shapes differ.
        """

    @abstractmethod
    def run(self, function: Callable[[], object]) -> Arrival:
        """Enqueue any function, such as a copy that a collective follows. The arrival holds it, as that of a copy does.

        Args:
            function: on a GPU it is called at once, with the lane as the current stream; on a simulated lane when
                somebody waits, on the thread that does.
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
    """

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        """Put the stream behind the current one."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Arrival:
        """Enqueue a copy."""
        _check_shapes(target, source)
        home = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream), torch.no_grad():
            target.copy_(source, non_blocking=True)
        return _CudaArrival(self._device, self._stream, home, (target, source))

    def run(self, function: Callable[[], object]) -> Arrival:
        """Call a function with the lane as the current stream."""
        home = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream), torch.no_grad():
            function()
        return _CudaArrival(self._device, self._stream, home, function)

    def running(self) -> AbstractContextManager[object]:
        """Make the lane the current stream."""
        return torch.cuda.stream(self._stream)

    def drain(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()


class _CudaArrival(Arrival):
    """An event on a lane.

    Args:
        device: the GPU.
        stream: the lane's.
        home: the stream that was current when the work was enqueued: memory goes back to that one's.
        kept: what has to live until `home` is behind the event, or the host has seen it.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream, home: torch.cuda.Stream, kept: object) -> None:
        self._device = device
        self._home = home
        self._kept: object = kept
        # A thread of the host that waits sleeps: spinning it would take a core from those that step.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> None:
        current = torch.cuda.current_stream(self._device)
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
    """A plain CPU, which has one stream: all is done at once."""

    def follow(self) -> None:
        """Do nothing: what came before is done."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Arrival:
        """Copy."""
        _check_shapes(target, source)
        with torch.no_grad():
            target.copy_(source)
        return _Arrived()

    def run(self, function: Callable[[], object]) -> Arrival:
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


class SimulatedLane(CopyLane):
    """Runs what it is given only when somebody waits for it, so that whoever forgets to wait is found out on a CPU.

    Waiting for an arrival runs all up to it, in order, on the thread that waits. Until then a copy's target is NaN
    (integers: all bits set) and its source must stay as it is, as on a GPU, where the copy may run at any moment between.
    What raises is raised by whoever's wait has run it, and again by each wait for its own arrival; what comes after it
    stays on the lane.
    """

    def __init__(self) -> None:
        self._queue: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._runner: int | None = None

    def follow(self) -> None:
        """Do nothing: what the current stream, a CPU, was given is done."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Arrival:
        """Enqueue a copy, and spoil its target."""
        _check_shapes(target, source)

        def copy() -> None:
            target.copy_(source)

        with self._changed:
            # Something earlier on this lane may read the target before it is overwritten, which is right on a GPU too.
            if not any(work.may_read(target) for work in self._queue):
                _spoil(target)
            return self._enqueue(_Work(copy, target=target, source=source))

    def run(self, function: Callable[[], object]) -> Arrival:
        """Enqueue a function."""
        with self._changed:
            return self._enqueue(_Work(function))

    def running(self) -> AbstractContextManager[object]:
        """Refuse."""
        raise RuntimeError("a simulated lane cannot run a caller's code late: give it a function, by run()")

    def drain(self) -> None:
        """Run what is left, all of it, whatever some of it raises."""
        first: Exception | None = None
        while (newest := self._newest()) is not None:
            try:
                self._run_until(newest)
            except Exception as error:  # noqa: BLE001  raised below, once the rest has run
                first = first or error
        if first is not None:
            raise first

    def is_pending(self, tensor: torch.Tensor) -> bool:
        """Return True if a copy that has not run reads or writes memory that this tensor shares."""
        with self._changed:
            return any(work.touches(tensor) for work in self._queue)

    def _enqueue(self, work: _Work) -> Arrival:
        self._queue.append(work)
        return _LateArrival(self, work)

    def _newest(self) -> _Work | None:
        with self._changed:
            if self._runner == threading.get_ident():
                raise RuntimeError("what runs on a lane cannot drain that lane: it would wait for itself")
            return self._queue[-1] if self._queue else None

    def _run_until(self, work: _Work) -> None:
        """Run all up to something, and raise what that, or anything before it that runs here, raises.

        No lock is held while something runs: it may wait for another lane, which another thread runs, and which waits
        for this one.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: work.is_done or self._runner in (None, threading.get_ident()))
                if work.is_done:
                    break
                if self._runner is not None:
                    raise RuntimeError("what runs on a lane waits for something that comes after it there")
                self._runner = threading.get_ident()
                oldest = self._queue[0]
            error = oldest.run()
            with self._changed:
                self._queue.popleft()
                oldest.finish(error)
                self._runner = None
                self._changed.notify_all()
            if error is not None and oldest is not work:
                raise error
        if work.error is not None:
            raise work.error


class _Work:
    """Something on a simulated lane; one that is no copy may read and write anything.

    Args:
        function: does it.
        target: what a copy writes.
        source: what a copy reads.
    """

    def __init__(
        self, function: Callable[[], object], *, target: torch.Tensor | None = None, source: torch.Tensor | None = None
    ) -> None:
        self._function: Callable[[], object] | None = function
        self._target = target
        self._source = source
        self.is_done = False
        self.error: BaseException | None = None

    def may_read(self, tensor: torch.Tensor) -> bool:
        return self._source is None or _share_memory(self._source, tensor)

    def touches(self, tensor: torch.Tensor) -> bool:
        return any(_share_memory(part, tensor) for part in (self._target, self._source) if part is not None)

    def run(self) -> BaseException | None:
        """Return what it raised, even an interrupt: the lane's state must come right before that goes on its way."""
        try:
            if self._function is not None:
                with torch.no_grad():
                    self._function()
        except BaseException as error:  # noqa: BLE001  whoever waits raises it
            return error
        return None

    def finish(self, error: BaseException | None) -> None:
        self._function = self._target = self._source = None
        self.error = error
        self.is_done = True


class _LateArrival(Arrival):
    """An arrival on a simulated lane."""

    def __init__(self, lane: SimulatedLane, work: _Work) -> None:
        self._lane = lane
        self._work = work

    def wait(self) -> None:
        self._lane._run_until(self._work)  # noqa: SLF001  one mechanism in two classes

    def synchronize(self) -> None:
        self.wait()

    @property
    def has_run(self) -> bool:
        return self._work.is_done


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage() is other.untyped_storage()


def _spoil(tensor: torch.Tensor) -> None:
    """Fill with what shows when it is read: NaN, or all bits set."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype == torch.bool:
            tensor.fill_(value=True)
        else:
            tensor.fill_(-1 if tensor.dtype.is_signed else torch.iinfo(tensor.dtype).max)


def _check_shapes(target: torch.Tensor, source: torch.Tensor) -> None:
    if target.shape != source.shape:
        raise ValueError(f"a copy of shape {tuple(source.shape)} does not fit a target of {tuple(target.shape)}")


def copy_lane(device: torch.device) -> CopyLane:
    """Return a lane of a device's own: a stream of a GPU; a CPU's copies are done at once.

    Args:
        device: what copies go to or come from.
    """
    return CudaLane(device) if device.type == "cuda" else ImmediateLane()
