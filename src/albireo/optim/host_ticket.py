"""A ticket: one step of the optimizer on the host, with the values of the moment at which it was opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch

from albireo.optim.adam_values import AdamValues, adam_state
from albireo.optim.host_step import HostStep
from albireo.optim.host_worker import HostWorker, WorkItem

__all__ = ["Ticket"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Ticket:
    """One step of the optimizer, of which the values were copied when it was opened. `HostStepper.open` makes it.

    What happens to the optimizer's groups, to a scheduler or to `.grad` fields afterwards changes nothing here. Items
    are done in the order in which they were submitted. The memory of gradients and outputs is the ticket's until their
    item is done.

    Within `with`, the ticket is open; it is sealed on the way out.
    """

    def __init__(
        self,
        worker: HostWorker,
        state: dict[torch.Tensor, Any],
        values: Mapping[torch.nn.Parameter, AdamValues],
        factor: float,
        on_done: Callable[[int], object] | None,
    ) -> None:
        self._worker = worker
        self._state = state
        self._values = values
        self._factor = factor
        self._on_done = on_done
        self._submitted: set[torch.nn.Parameter] = set()
        self._done = 0
        self._sealed = False

    @property
    def is_sealed(self) -> bool:
        """True once nothing can be submitted any more."""
        return self._sealed

    @property
    def submitted(self) -> int:
        """How many items have been submitted."""
        return len(self._submitted)

    @property
    def done(self) -> int:
        """How many items are done: those with an index below this number. Their `on_done` has returned."""
        return self._done

    def submit(
        self,
        parameter: torch.nn.Parameter,
        gradient: torch.Tensor,
        *,
        output: torch.Tensor | None = None,
        ready: Callable[[], object] | None = None,
    ) -> int:
        """Hand over a parameter to be stepped. One that is not submitted is not touched: no decay, no count.

        Args:
            parameter: one of the optimizer's: contiguous, 1-D, fp32, in host memory.
            gradient: of its length, contiguous, 1-D, fp32, bf16 or fp16, in host memory; only read.
            output: where the new weights go: of the same kind as a gradient, pinned or not.
            ready: called by the worker before it reads the gradient, to wait until it has arrived, for instance
                `torch.cuda.Event.synchronize`.

        Returns:
            The item's index: 0, 1, 2 in the order of the calls.

        Raises:
            ValueError: the tensors are not such, or the optimizer has no such parameter.
            RuntimeError: the ticket is sealed, has this parameter already, or the worker has stopped on an error.
        """
        if self._sealed:
            raise RuntimeError("this ticket is sealed: open the next one for more items")
        if parameter in self._submitted:
            raise RuntimeError("this parameter is in the ticket already: submit each once a step")
        values = self._values.get(parameter)
        if values is None:
            raise ValueError(
                "the optimizer had no such parameter when the ticket was opened: submit those of its groups"
            )
        _check("the parameter", parameter, parameter.numel(), (torch.float32,))
        _check("the gradient", gradient, parameter.numel(), _DTYPES)
        if output is not None:
            _check("the output", output, parameter.numel(), _DTYPES)
        self._worker.refuse_after_error()
        state = adam_state(self._state, parameter)
        for name in ("exp_avg", "exp_avg_sq"):
            _check(f"the state {name}", state[name], parameter.numel(), (torch.float32,))
        # Through numpy, which is several times as quick: this runs on the loop's core, for every parameter.
        count = state["step"].numpy()
        count += 1
        step = HostStep(
            parameter, state["exp_avg"], state["exp_avg_sq"], gradient, output, values, float(count), self._factor
        )
        index = len(self._submitted)
        self._submitted.add(parameter)
        self._worker.put(WorkItem(step, ready, partial(self._report, index)))
        return index

    def seal(self) -> None:
        """Say that all items have been submitted. A second call does nothing."""
        self._sealed = True

    def wait(self) -> None:
        """Seal the ticket, and block until all its items are done.

        Raises:
            Exception: what stopped the worker.
        """
        self.seal()
        self._worker.wait_until(lambda: self._done == len(self._submitted))

    def wait_for(self, index: int) -> None:
        """Block until an item is done.

        Args:
            index: what `submit` returned.

        Raises:
            ValueError: there is no such item.
            Exception: what stopped the worker.
        """
        if not 0 <= index < len(self._submitted):
            raise ValueError(f"the ticket has {len(self._submitted)} items, none of index {index}")
        self._worker.wait_until(lambda: self._done > index)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Block until something holds that comes to hold when an item is done.

        Args:
            condition: looked at after each item.

        Raises:
            Exception: what stopped the worker.
        """
        self._worker.wait_until(condition)

    def __enter__(self) -> Self:
        """Return the ticket."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Seal it."""
        self.seal()

    def _report(self, index: int) -> None:
        """Count an item as done; called by the worker."""
        if self._on_done is not None:
            self._on_done(index)
        self._done = index + 1


def _check(what: str, tensor: torch.Tensor, numel: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.device.type != "cpu" or tensor.dim() != 1 or tensor.numel() != numel or not tensor.is_contiguous():
        raise ValueError(
            f"{what} must be contiguous, 1-D of {numel} elements, in host memory; it has shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()} and is on {tensor.device}"
        )
    if tensor.dtype not in dtypes:
        raise ValueError(f"{what} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
