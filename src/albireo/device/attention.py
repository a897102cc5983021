"""Which kernels torch takes for attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["attention_for_many_shapes"]


def attention_for_many_shapes(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which attention needs no preparation for a shape that it has not seen.

    In 16 bits on a GPU torch prefers cuDNN's kernels, the fastest for a shape that comes again and again. For each new
    shape a plan is made first, which takes a tenth of a second: batches as long as their longest sample are of a new
    shape in almost every step.

    Args:
        device: what computes.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
