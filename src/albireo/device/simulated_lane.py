"""Simulated lanes: on a laptop, copies run as late as their events allow, so that whoever does not wait is found out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from albireo.device.lanes import Arrival, CopyLane, check_shapes
from albireo.device.watch import WorkLabel, at_work, waiting

__all__ = ["SimulatedLane"]


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

    def copy(self, target: torch.Tensor, source: torch.Tensor, label: WorkLabel | None = None) -> Arrival:
        """Enqueue a copy, and spoil its target."""
        check_shapes(target, source)

        def copy() -> None:
            target.copy_(source)

        with self._changed:
            # Something earlier on this lane may read the target before it is overwritten, which is right on a GPU too.
            if not any(work.may_read(target) for work in self._queue):
                _spoil(target)
            return self._enqueue(_Work(copy, label, target=target, source=source))

    def run(self, function: Callable[[], object], label: WorkLabel | None = None) -> Arrival:
        """Enqueue a function."""
        with self._changed:
            return self._enqueue(_Work(function, label))

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
            with at_work(self.watch, oldest.label):
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
        label: what it is, for whoever looks.
        target: what a copy writes.
        source: what a copy reads.
    """

    def __init__(
        self,
        function: Callable[[], object],
        label: WorkLabel | None = None,
        *,
        target: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
    ) -> None:
        self._function: Callable[[], object] | None = function
        self.label = label
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
        with waiting(None if self.has_run else self._lane.watch, self._work.label):
            self.synchronize()

    def synchronize(self) -> None:
        self._lane._run_until(self._work)  # noqa: SLF001  one mechanism in two classes

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
