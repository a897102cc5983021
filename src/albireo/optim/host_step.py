"""One tensor's step of Adam on the host, as it was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["AdamValues", "HostStep"]


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
