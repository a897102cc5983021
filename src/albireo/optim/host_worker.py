"""The threads behind a host stepper, and the queue to them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from albireo.optim.host_kernel import HostKernel
from albireo.optim.host_step import HostStep

__all__ = ["HostWorker", "WorkItem"]


@dataclass(frozen=True, eq=False)
class WorkItem:
    """A step, and who hears of it.

    Attributes:
        step: what to do.
        ready: returns when the gradient has arrived; None: it is there.
        report: called when the step is done.
    """

    step: HostStep
    ready: Callable[[], object] | None
    report: Callable[[], object]


class HostWorker:
    """The threads behind a stepper: one begins steps, one reports what is done, so that neither waits for the other.

    It knows no stepper, so that a forgotten one can be freed.

    Args:
        kernel: what steps; closed with this.
    """

    def __init__(self, kernel: HostKernel) -> None:
        self.kernel = kernel
        self._process = os.getpid()
        # None ends a queue.
        self._waiting: SimpleQueue[WorkItem | None] = SimpleQueue()
        self._begun: SimpleQueue[WorkItem | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._put = self._reported = 0
        self._error: BaseException | None = None
        self._seen = False
        started = threading.Event()
        self._threads = [
            threading.Thread(target=body, args=arguments, name=f"albireo-host-stepper-{name}", daemon=True)
            for name, body, arguments in (("begin", self._begin, (started,)), ("report", self._report, ()))
        ]
        for thread in self._threads:
            thread.start()
        started.wait()
        # A new thread takes over the number of threads that was set last, in whatever thread that was.
        torch.set_num_threads(torch.get_num_threads())

    @property
    def is_idle(self) -> bool:
        """True if all that was put has been done and reported."""
        return self._reported == self._put

    def put(self, item: WorkItem) -> None:
        """Add an item.

        Args:
            item: begun after all that were put before it, reported after them.
        """
        self._put += 1
        self._waiting.put(item)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Block until something holds that comes to hold when an item is reported.

        Args:
            condition: looked at after each report.

        Raises:
            Exception: what stopped the threads.
        """
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._error is not None)
            if not condition() and self._error is not None:
                self._seen = True
                raise self._error

    def refuse_after_error(self) -> None:
        """Do nothing, unless the threads have stopped.

        Raises:
            RuntimeError: they have; its cause says why.
        """
        if self._error is not None:
            self._seen = True
            raise RuntimeError(
                "the host stepper has stopped on an error, and its weights are half stepped: load a checkpoint"
            ) from self._error

    def raise_unseen_error(self) -> None:
        """Raise what stopped the threads, if nobody has seen it."""
        if self._error is not None and not self._seen:
            self._seen = True
            raise self._error

    def end(self) -> None:
        """Let the threads finish what they have, and wait for them."""
        if os.getpid() != self._process:
            # Forked, as workers of a DataLoader are: the threads are the other process's, and what they wait on cannot
            # be taken down here.
            return
        self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        self.kernel.close()

    def _begin(self, started: threading.Event) -> None:
        try:
            self.kernel.start()
            started.set()
            while (item := self._waiting.get()) is not None:
                # After an error nothing more is stepped, but the queue is emptied: its tensors are to be freed.
                if self._error is None:
                    if item.ready is not None:
                        item.ready()
                    self.kernel.submit(item.step)
                    self._begun.put(item)
                # Its tensors are not to be kept until the next one comes.
                del item
        except BaseException as error:  # noqa: BLE001  raised where the caller waits
            self._fail(error)
        finally:
            started.set()
            self._begun.put(None)

    def _report(self) -> None:
        done = 0
        try:
            while (item := self._begun.get()) is not None:
                if done <= self._reported:
                    done = self.kernel.wait(self._reported + 1)
                item.report()
                with self._changed:
                    self._reported += 1
                    self._changed.notify_all()
                del item
        except BaseException as error:  # noqa: BLE001  raised where the caller waits
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()
