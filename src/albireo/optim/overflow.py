"""A step that an overflow leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["flagged", "leaves_out_by_flag", "step_unless"]


def leaves_out_by_flag(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Return True if a step is left out where a flag on the device says so, and leaves no trace.

    Fused kernels of Adam look at the flag, so that the host does not wait to know. Others must be asked on the host:
    some do not look, and fused SGD would keep a momentum that was never filled. So must Adam before its first step, for
    its states would be made.

    Args:
        optimizer: any torch optimizer.
        parameters: what it is to step.
    """
    known = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    if not known or not all(group.get("fused") is True for group in optimizer.param_groups):
        return False
    return all(parameter in optimizer.state for parameter in parameters)


@contextmanager
def flagged(optimizer: torch.optim.Optimizer, overflow: torch.Tensor) -> Iterator[None]:
    """Show a flag to the kernels of the steps within.

    Args:
        optimizer: one of which `leaves_out_by_flag` is true.
        overflow: 1 where a step is to be left out, else 0; an fp32 scalar on the device.
    """
    # The attributes by which torch's own loss scaler tells fused kernels.
    attributes = vars(optimizer)
    attributes.update(grad_scale=None, found_inf=overflow)
    try:
        yield
    finally:
        del attributes["grad_scale"], attributes["found_inf"]


def step_unless(optimizer: torch.optim.Optimizer, overflow: torch.Tensor) -> None:
    """Step an optimizer unless a flag says that a gradient was not finite.

    Args:
        optimizer: any torch optimizer; its gradients are as they are to be stepped.
        overflow: 1 where the step is to be left out, else 0; an fp32 scalar.
    """
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if leaves_out_by_flag(optimizer, stepped):
        with flagged(optimizer, overflow):
            optimizer.step()
    elif not bool(overflow):
        optimizer.step()
