"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["decay_groups"]


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those that decay and those that do not.

    Biases and the weights of norms are vectors, and everything else has two dimensions or more: so the shape tells.

    Args:
        named_parameters: names and parameters; frozen ones are left out.
        weight_decay: AdamW's decay of the first group.

    Returns:
        Two groups for a torch optimizer, either left out if it would be empty.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
