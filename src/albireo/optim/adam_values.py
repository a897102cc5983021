"""What a step of Adam is given: the values of a group, and a parameter's states."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["AdamValues", "adam_state", "is_adam"]


@dataclass(frozen=True)
class AdamValues:
    """What a parameter group says, as it was at the call.

    Attributes:
        lr: the learning rate.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: what is added to the denominator.
        weight_decay: the decay of weights.
        decoupled: weights decay by themselves (AdamW); else the decay is added to the gradient.
        maximize: steps go up the gradient.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool

    @staticmethod
    def of(group: Mapping[str, Any]) -> AdamValues:
        """Copy what a group of an Adam or AdamW says; waits for the device if its rate is a tensor there."""
        beta1, beta2 = group["betas"]
        return AdamValues(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=bool(group["decoupled_weight_decay"]),
            maximize=bool(group["maximize"]),
        )


def is_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if an optimizer steps as torch's Adam or AdamW does, whatever its class adds."""
    adam = torch.optim.Adam
    # Both are wrapped, by torch itself, in hooks of which each has a number of its own.
    same_step = inspect.unwrap(type(optimizer).step) is inspect.unwrap(adam.step)
    return isinstance(optimizer, adam) and same_step


def adam_state(states: dict[torch.Tensor, Any], parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Return a parameter's states, made beside it as a fused Adam makes them if there are none.

    Args:
        states: the optimizer's.
        parameter: whose.
    """
    state: dict[str, torch.Tensor] = states[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
    return state
