"""The learning rate over the steps."""

from __future__ import annotations

import math

import torch

__all__ = ["learning_rate_factor", "scheduler_for", "set_scheduler_step", "warmup_steps_of"]


def warmup_steps_of(warmup: float, steps: int) -> int:
    """Return the warm-up's length in steps.

    Args:
        warmup: a share of all steps if below 1, else a number of steps.
        steps: all steps.
    """
    # Rounded first: 0.07 of 100 steps is 7.000000000000001 in binary, which is no reason for an eighth.
    return math.ceil(round(warmup * steps, 6)) if warmup < 1 else int(warmup)


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, schedule: str) -> float:
    """Return the share of the peak learning rate that a step uses.

    Args:
        step: the step's number from 0.
        steps: all steps.
        warmup_steps: over how many the rate rises from 0 to its peak; the first of them already moves.
        schedule: "linear" or "cosine" to zero, or "constant".

    Returns:
        A number from 0 to 1. No step of a run has a rate of 0: that is reached only after the last.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduler_for(
    optimizer: torch.optim.Optimizer, *, steps: int, warmup_steps: int, schedule: str
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return torch's scheduler for a schedule; its state is the step alone.

    Args:
        optimizer: whose groups' rates are set.
        steps: all steps.
        warmup_steps: the warm-up's length.
        schedule: its form.
    """

    def factor(step: int) -> float:
        return learning_rate_factor(step, steps=steps, warmup_steps=warmup_steps, schedule=schedule)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def set_scheduler_step(scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Put a scheduler at a step, with the rates that its own function gives there.

    Args:
        scheduler: a scheduler that has made no step yet.
        step: how many steps it is to have made.
    """
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(
        {**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    )
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
