"""The host stepper: Adam for states in host memory, on threads of its own, beside the loop that launches the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch

from albireo.device.cores import usable_cores
from albireo.errors import ConfigError
from albireo.log import Log
from albireo.optim.adam_values import AdamValues, is_adam
from albireo.optim.host_kernel_choice import choose_kernel
from albireo.optim.host_ticket import Ticket
from albireo.optim.host_worker import HostWorker

__all__ = ["HostStepper", "stepper_threads"]

# The loop that launches the device's work has one core, and what it starts beside it (copies, the reader of data) one.
_LOOP_CORES = 2


def stepper_threads(cores: int, *, ranks: int = 1) -> int:
    """Return how many threads may step on the host, so that two cores a rank are left to the loop.

    Args:
        cores: what `usable_cores` says of the machine.
        ranks: how many ranks share it, each with a stepper of its own.

    Returns:
        At least 1.
    """
    return max(1, cores // max(1, ranks) - _LOOP_CORES)


class HostStepper:
    """Steps a torch Adam or AdamW whose weights and states are in host memory, on threads of its own.

    A step is a *ticket*. `open` copies the hyperparameters of all groups; `Ticket.submit` hands over one parameter at
    a time, in any order, also while other gradients are still on their way; a single worker takes the items in that
    order. It casts a gradient to fp32, multiplies it by the ticket's factor, steps weights and moments in place and
    casts the new weights to an output, all slice by slice, so that host memory is read and written once.

    Steps have the bits of `torch.optim.AdamW(fused=True)`, or of `Adam(fused=True)`, on fp32 gradients that were cast
    and multiplied by torch. States are in `optimizer.state` as torch makes them: "step", "exp_avg", "exp_avg_sq".

    It is a context manager; its threads end with it.

    Args:
        optimizer: Adam, AdamW or HybridAdam, over contiguous 1-D fp32 parameters in host memory.
        threads: how many compute; all usable cores but two if None. Give a number where ranks share the machine.
        compiled: False takes torch's own kernels even where a compiled one can be had; no bit depends on it.
        log: where a line goes if the compiled kernel cannot be had.

    Raises:
        ConfigError: the optimizer is none of these, or uses a variant that is not there.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        threads: int | None = None,
        compiled: bool = True,
        log: Log | None = None,
    ) -> None:
        self.check(optimizer)
        if threads is None:
            threads = stepper_threads(usable_cores())
        if threads < 1:
            raise ConfigError(f"the host stepper computes with at least 1 thread, not with {threads}")
        self._optimizer = optimizer
        self._ticket: Ticket | None = None
        self._worker = HostWorker(choose_kernel(threads, compiled=compiled, log=log))
        # For one that is never closed: the thread must not outlive the interpreter.
        self._end = weakref.finalize(self, self._worker.end)

    @staticmethod
    def check(optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that cannot be stepped on the host.

        Raises:
            ConfigError: with what to do instead.
        """
        _values_by_parameter(optimizer)

    @property
    def kernel_name(self) -> str:
        """What computes: "compiled" or "torch"."""
        return self._worker.kernel.name

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return self._worker.kernel.threads

    def open(self, factor: float = 1.0, on_done: Callable[[int], object] | None = None) -> Ticket:
        """Begin a step: copy learning rates and all other values of the groups.

        Args:
            factor: what gradients are multiplied by in fp32 (1 / loss scale, times the clip coefficient). 1.0 changes
                no bit.
            on_done: called by the worker with an item's index once the item is done, in the order of the indices.

        Raises:
            RuntimeError: the ticket before is not sealed, the stepper is closed or has stopped on an error.
            ConfigError: a group has come to use a variant that is not there.
        """
        if not self._end.alive:
            raise RuntimeError("the host stepper is closed")
        if self._ticket is not None and not self._ticket.is_sealed:
            raise RuntimeError("the ticket before is still open: seal it before the next one")
        self._worker.refuse_after_error()
        values = _values_by_parameter(self._optimizer)
        self._ticket = Ticket(self._worker, self._optimizer.state, values, float(factor), on_done)
        return self._ticket

    def flush(self) -> None:
        """Block until all that was submitted is done: to be called before weights or states are read.

        Raises:
            RuntimeError: a ticket is open, so that half a step would be read.
            Exception: what stopped the worker.
        """
        if self._ticket is not None and not self._ticket.is_sealed:
            raise RuntimeError("a ticket is open: seal it before weights or states are read")
        self._worker.wait_until(lambda: self._worker.is_idle)

    def close(self) -> None:
        """Finish what was submitted and end the threads. A second call does nothing.

        Raises:
            Exception: what stopped the worker, unless it has been raised before.
        """
        if self._end.alive:
            self._end()
            self._worker.raise_unseen_error()

    def __enter__(self) -> Self:
        """Return the stepper."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it; an error that is already under way is not covered by another."""
        if error is None:
            self.close()
        else:
            self._end()


def _values_by_parameter(optimizer: torch.optim.Optimizer) -> dict[torch.nn.Parameter, AdamValues]:
    """Copy what the groups say.

    Raises:
        ConfigError: it is not Adam, or a variant that is not there.
    """
    if not is_adam(optimizer):
        raise ConfigError(
            f"the host stepper steps Adam and AdamW, not {type(optimizer).__name__}: take HybridAdam, or leave the "
            "optimizer's states on the device"
        )
    values: dict[torch.nn.Parameter, AdamValues] = {}
    for group in optimizer.param_groups:
        for variant in ("amsgrad", "differentiable"):
            if group.get(variant):
                raise ConfigError(
                    f"the host stepper has no {variant}=True: leave it out, or leave the optimizer's states on the device"
                )
        values.update(dict.fromkeys(group["params"], AdamValues.of(group)))
    return values
