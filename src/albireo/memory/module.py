"""Hooks on a model's units. No model is patched: torch's own hooks tell what begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from albireo.memory.conductor import Conductor
from albireo.memory.units import Unit

__all__ = ["hook_units"]


def hook_units(units: Sequence[Unit], conductor: Conductor) -> None:
    """Have a conductor hear of all uses of units.

    Args:
        units: the last is the root.
        conductor: who hears.
    """
    for unit in units:
        before, after = _not_compiled(_before_forward(unit, conductor)), _not_compiled(_after_forward(unit, conductor))
        unit.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        unit.module.register_forward_hook(after)
    root = units[-1]
    within = {id(part) for unit in units[:-1] for part in unit.module.modules()}
    mine = set(root.parameters)
    for module in root.module.modules():
        # Somebody may call a part of the model without the whole, to generate for instance.
        if module is not root.module and id(module) not in within and mine & set(module.parameters(recurse=False)):
            module.register_forward_pre_hook(_not_compiled(_before_part(conductor)), prepend=True)


def _not_compiled(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep a hook from the compiler: a user may have compiled a block with its hooks (`block.compile()`)."""
    kept: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return kept


def _before_part(conductor: Conductor) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        conductor.touch_root()

    return hook


def _before_forward(unit: Unit, conductor: Conductor) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        # A recomputation has the same inputs as the forward, which are hooked already.
        hooked = [] if conductor.in_backward else [value for value in inputs if value.requires_grad]
        if any(value.is_leaf for value in hooked):
            # A leaf lives on, and so would its hooks: what the unit has frozen stays to the end of backward.
            hooked = []
        conductor.enter_forward(unit, sum(value.numel() for value in inputs))
        if hooked and torch.is_grad_enabled():
            conductor.expect_inputs(unit, len(hooked))
            for value in hooked:
                value.register_hook(_with_gradient(lambda: conductor.input_done(unit)))  # type: ignore[no-untyped-call]

    return hook


def _after_forward(unit: Unit, conductor: Conductor) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value.register_hook(_with_gradient(lambda: conductor.enter_backward(unit)))  # type: ignore[no-untyped-call]
        conductor.leave_forward(unit)

    return hook


def _with_gradient(event: Callable[[], None]) -> Callable[[torch.Tensor], None]:
    """Return a hook on a tensor that leaves its gradient as it is."""

    def hook(_: torch.Tensor) -> None:
        event()

    return hook
