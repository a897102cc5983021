"""Under FSDP2 every rank reduces the same gradients: zeros stand for those of parameters that it has not used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

__all__ = ["UnusedAsZeros"]


class UnusedAsZeros:
    """Gives parameters without a gradient one of zeros, just before torch reduces their group's.

    torch reduces the gradients that a rank has. Where ranks have different ones they send different numbers of elements:
    over NCCL that never ends, and over gloo gradients may land in other parameters. torch 2.13 has a switch for this, and
    2.11 has not.

    A group's gradients are reduced when backward has come to what went into the group, or, if nothing that went in wants
    a gradient, when all of backward has ended: both moments are met here, a hook ahead of torch's own.

    Args:
        groups: what `fully_shard` was called with, each with its parameters in the form that computes; there is a form
            of a parameter from a group's first use on.
        reduces: tells whether the backward at hand reduces at all.
    """

    def __init__(self, groups: Mapping[nn.Module, Iterable[nn.Parameter]], *, reduces: Callable[[], bool]) -> None:
        self._groups = {module: [p for p in parameters if p.requires_grad] for module, parameters in groups.items()}
        self._reduces = reduces
        self._met: set[nn.Module] = set()
        self._is_end_awaited = False
        for module in self._groups:
            # torch's own hooks were there before: it puts its node under the inputs, and then these come into its outputs.
            module.register_forward_pre_hook(self._watch_inputs, with_kwargs=True)
            module.register_forward_hook(self._watch_outputs, prepend=True)

    def forget(self) -> None:
        """Begin anew after a backward that failed midway."""
        self._met.clear()
        self._is_end_awaited = False

    def _watch_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in _differentiable((args, kwargs)):
            tensor.register_hook(lambda _, module=module: self._fill(module))  # type: ignore[no-untyped-call]

    def _watch_outputs(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        for tensor in _differentiable(outputs):
            tensor.register_hook(lambda _: self._await_end())  # type: ignore[no-untyped-call]

    def _await_end(self) -> None:
        if not self._is_end_awaited:
            self._is_end_awaited = True
            # Callbacks run in the order in which they were queued, and torch's is queued by a hook that comes after.
            torch.autograd.Variable._execution_engine.queue_callback(self._end)  # noqa: SLF001

    def _end(self) -> None:
        for module in self._groups:
            if module not in self._met:
                self._fill(module)
        self.forget()

    def _fill(self, module: nn.Module) -> None:
        self._met.add(module)
        if self._reduces():
            for parameter in self._groups[module]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)


def _differentiable(values: Any) -> list[torch.Tensor]:
    if not torch.is_grad_enabled():
        return []
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
