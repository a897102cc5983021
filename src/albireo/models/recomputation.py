"""Activation checkpointing of one call: what it has saved for backward is forgotten, and computed again when it is asked for.

The way of `torch.utils.checkpoint` without reentrance (Chen et al., 2016), with hooks on what autograd saves, as little as it
takes: torch's own is as long in Python as a block of a small model is on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["recompute_in_backward"]


def recompute_in_backward(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of which autograd is to keep the inputs alone; backward calls it again.

    The second call ends as soon as it has made what is asked for. Random numbers are not drawn again: nothing that draws
    any, such as dropout, may be in it.

    Args:
        function: computes the same whenever it is called. Tensors that it has besides its arguments are kept.
        args: what it is called with.

    Returns:
        What it returns.

    Raises:
        RuntimeError: in backward, if the second call computes something else, or an argument was changed in between.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    recomputation = _Recomputation(function, args)
    with saved_tensors_hooks(recomputation.count, recomputation.find):
        return function(*args)


class _Enough(Exception):  # noqa: N818  nothing has gone wrong
    """All that was saved in forward has been computed again."""


class _Recomputation:
    """What is kept of a call: its inputs, and the forms of what it has saved. Autograd's nodes keep it, and nobody else."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        # Without the graph that they are of. What was saved depends on what needs a gradient.
        self._args = [_kept(argument) for argument in args]
        self._autocast = _autocast_states(args)
        self._forms: list[tuple[torch.Size, torch.dtype]] = []
        self._found: dict[int, Tensor] = {}

    def count(self, tensor: Tensor) -> int:
        """Take what forward saves: its place is kept, and nothing of it."""
        self._forms.append((tensor.shape, tensor.dtype))
        return len(self._forms) - 1

    def find(self, place: int) -> Tensor:
        """Return what forward had saved; each is there once."""
        if place not in self._found:
            # Also where a graph is gone through a second time.
            self._compute()
        return self._found.pop(place)

    def _compute(self) -> None:
        self._found.clear()
        seen = 0

        def take(tensor: Tensor) -> Tensor:
            nonlocal seen
            if (tensor.shape, tensor.dtype) != self._forms[seen]:
                raise _differs(f"{tuple(tensor.shape)} in {tensor.dtype} where there was {self._forms[seen]}")
            self._found[seen] = alone = tensor.detach()
            seen += 1
            if seen == len(self._forms):
                raise _Enough
            return alone

        with ExitStack() as stack:
            for device_type, dtype, cached in self._autocast:
                stack.enter_context(torch.autocast(device_type, dtype=dtype, cache_enabled=cached))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(take, lambda tensor: tensor))
            try:
                self._function(*[_again(*argument) for argument in self._args])
            except _Enough:
                return
        raise _differs(f"{seen} tensors were saved where there were {len(self._forms)}")


def _kept(argument: Any) -> tuple[Any, bool | None, int]:
    if not isinstance(argument, Tensor):
        return argument, None, 0
    return argument.detach(), argument.requires_grad, argument._version  # noqa: SLF001  torch has no other name for it


def _again(value: Any, needs_gradient: bool | None, version: int) -> Any:
    if needs_gradient is None:
        return value
    if value._version != version:  # noqa: SLF001  torch has no other name for it
        raise RuntimeError(
            "an input of a block that is recomputed in backward was changed in place after its forward: change a copy of it"
        )
    return value.detach().requires_grad_(needs_gradient)


def _differs(what: str) -> RuntimeError:
    return RuntimeError(
        f"a block computed something else in backward than in forward ({what}): what it computes may depend on its inputs "
        "alone, or train without checkpointing"
    )


def _autocast_states(args: tuple[Any, ...]) -> list[tuple[str, torch.dtype, bool]]:
    """Return the autocasts that are on: backward runs outside of them."""
    types = {"cpu", *(argument.device.type for argument in args if isinstance(argument, Tensor))}
    cached = torch.is_autocast_cache_enabled()
    return [(kind, torch.get_autocast_dtype(kind), cached) for kind in sorted(types) if torch.is_autocast_enabled(kind)]
