"""One tensor's step of Adam on the host, as it was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from albireo.optim.adam_values import AdamValues

__all__ = ["HostStep"]


@dataclass(frozen=True, eq=False)
class HostStep:
    """One tensor's step. All tensors are contiguous, 1-D, of one length, and in host memory.

    Attributes:
        master: fp32 weights; stepped in place.
        exp_avg: fp32 first moments; updated in place.
        exp_avg_sq: fp32 second moments; updated in place.
        gradient: fp32, bf16 or fp16; only read.
        output: fp32, bf16 or fp16; gets the new weights, rounded to nearest even. None: they are not wanted.
        values: the group's.
        number: which step of this tensor it is; the first is 1.
        factor: what the gradient is multiplied by, in fp32, once it is cast. 1.0 changes nothing.
    """

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    gradient: torch.Tensor
    output: torch.Tensor | None
    values: AdamValues
    number: float
    factor: float
