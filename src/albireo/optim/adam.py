"""AdamW as this project uses it: torch's fused kernel, on the device and on the host."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["adamw"]


def adamw(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter, 2019) with torch's fused kernel.

    Args:
        groups: parameter groups, each with its weight decay.
        learning_rate: the peak learning rate.
    """
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
