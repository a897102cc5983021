"""A step that an overflow leaves out."""

from __future__ import annotations

import torch

from albireo.optim.wrapper import steps_by_flag

__all__ = ["step_unless"]


def step_unless(optimizer: torch.optim.Optimizer, overflow: torch.Tensor) -> None:
    """Step an optimizer unless a flag says that a gradient was not finite.

    A kernel that looks at the flag itself spares the host the wait to know. States that are made for a step which is
    then left out would be a trace of it, so the host asks while there are none.

    Args:
        optimizer: any torch optimizer; its gradients are as they are to be stepped.
        overflow: exactly 1 where the step is to be left out, else 0; an fp32 scalar.
    """
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not (steps_by_flag(optimizer) and all(parameter in optimizer.state for parameter in stepped)):
        if not bool(overflow):
            optimizer.step()
        return
    # The attributes by which torch's own loss scaler tells fused kernels.
    attributes = vars(optimizer)
    attributes.update(grad_scale=None, found_inf=overflow)
    try:
        optimizer.step()
    finally:
        del attributes["grad_scale"], attributes["found_inf"]
