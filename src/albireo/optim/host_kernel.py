"""What steps tensors in host memory: cast in, Adam, cast out, on several threads."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque

import torch

from albireo.optim.fused_step import fused_step
from albireo.optim.host_library import Form, HostAdamLibrary
from albireo.optim.host_step import HostStep

__all__ = ["CompiledKernel", "HostKernel", "TorchKernel"]

# Elements a thread. The scratch of a slice and its weights stay in the cores' caches from cast to cast; smaller slices
# lose more to the calls than they win. A multiple of 64, so that no slice but a tensor's last has a tail: fused kernels
# compute tails by other instructions, with other last bits.
_SLICE = 256 * 1024
# How many steps the C file has room for.
_RING = 1024


class HostKernel(ABC):
    """Takes steps in their order.

    Attributes:
        name: what computes, for a line to the user.
        threads: how many threads compute.
    """

    name: str
    threads: int

    @abstractmethod
    def start(self) -> None:
        """Get ready, in the thread that will call `submit`."""

    @abstractmethod
    def submit(self, step: HostStep) -> None:
        """Begin a step. Its tensors must live until `wait` has returned for it.

        Args:
            step: what to do.
        """

    @abstractmethod
    def wait(self, count: int) -> int:
        """Block until the first so many steps ever submitted are done.

        Args:
            count: how many; not more than were submitted.

        Returns:
            How many are done by now.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish what was submitted and end what was started. A second call does nothing."""


class TorchKernel(HostKernel):
    """torch's own kernels, on slices that stay in cache; equal to the bit to the fused kernel on the whole tensor.

    Args:
        threads: how many compute.
        slice_elements: how many elements are stepped at a time, a multiple of 64; 256 K a thread if None.
    """

    name = "torch"

    def __init__(self, threads: int, *, slice_elements: int | None = None) -> None:
        self.threads = threads
        self._slice = _SLICE * threads if slice_elements is None else slice_elements
        self._scratch = torch.empty(0)
        self._submitted = 0

    def start(self) -> None:
        """See the base class."""
        # torch keeps this number for each thread.
        torch.set_num_threads(self.threads)

    @torch.no_grad()
    def submit(self, step: HostStep) -> None:
        """Do a step; it is done on return."""
        number = torch.tensor(step.number, dtype=torch.float32)
        total = step.master.numel()
        for begin in range(0, total, self._slice):
            part = slice(begin, min(begin + self._slice, total))
            master = step.master[part]
            self._step_slice(step, master, self._cast_in(step, part), part, number)
            if step.output is not None:
                step.output[part].copy_(master)
        self._submitted += 1

    def wait(self, count: int) -> int:  # noqa: ARG002  for those that are not done on return
        """See the base class: all that was submitted is done."""
        return self._submitted

    def close(self) -> None:
        """See the base class: there is nothing to end."""

    def _cast_in(self, step: HostStep, part: slice) -> torch.Tensor:
        """Return a slice of the gradient in fp32, multiplied by the factor."""
        gradient = step.gradient[part]
        if gradient.dtype == torch.float32 and step.factor == 1.0:
            return gradient
        if self._scratch.numel() < gradient.numel():
            self._scratch = torch.empty(min(self._slice, step.master.numel()))
        scratch = self._scratch[: gradient.numel()]
        scratch.copy_(gradient)
        if step.factor != 1.0:
            scratch.mul_(step.factor)
        return scratch

    @staticmethod
    def _step_slice(
        step: HostStep, master: torch.Tensor, gradient: torch.Tensor, part: slice, number: torch.Tensor
    ) -> None:
        fused_step(step.values, number, [master], [gradient], [step.exp_avg[part]], [step.exp_avg_sq[part]])


class CompiledKernel(HostKernel):
    """`host_adam.c` on threads of its own, which take slices of the steps in their order.

    Args:
        library: what computes.
        form: how it rounds.
        threads: how many.
    """

    name = "compiled"

    def __init__(self, library: HostAdamLibrary, form: Form, threads: int) -> None:
        self.threads = threads
        self._library = library
        self._queue = library.begin(form)
        self._submitted = 0
        # The C file has addresses alone: these keep the tensors.
        self._in_flight: deque[HostStep] = deque()
        self._let_go = 0
        self._threads = [
            threading.Thread(target=library.work, args=(self._queue,), name=f"albireo-host-adam-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self) -> None:
        """See the base class: the threads are there."""

    def submit(self, step: HostStep) -> None:
        """See the base class."""
        self._in_flight.append(step)
        while not self._library.submit(self._queue, step):
            # For many, since each wait may have to get the interpreter's lock back from a busy loop.
            self._library.wait(self._queue, self._submitted - _RING // 2)
        self._submitted += 1

    def wait(self, count: int) -> int:
        """See the base class."""
        done = self._library.wait(self._queue, count)
        while self._let_go < done:
            self._in_flight.popleft()
            self._let_go += 1
        return done

    def close(self) -> None:
        """See the base class."""
        if self._threads:
            self._library.end(self._queue)
            for thread in self._threads:
                thread.join()
            self._threads = []
            self._library.free(self._queue)
