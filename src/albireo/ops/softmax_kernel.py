"""Softmax, loss and the logits' gradient in one pass over a piece of logits, as one Triton kernel.

In torch's own kernels this is a log-softmax, an exponential and two scatters: five passes over the largest tensor of a
language model. Here each row is read twice, the second time from the cache, and its gradient written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["loss_and_gradient"]


def loss_and_gradient(logits: Tensor, labels: Tensor, keep: Tensor, gradient: Tensor, scale: float) -> Tensor:
    """Write the gradient of the summed cross entropy, and return each row's loss.

    Args:
        logits: `[N, V]` in fp32, contiguous rows.
        labels: `[N]`, int64; what stands where `keep` is False does not matter.
        keep: `[N]`, bool; rows that count.
        gradient: `[N, V]`, where (softmax - one-hot) times the scale goes; may be `logits` itself.
        scale: factor of the gradient.

    Returns:
        `[N]` in fp32: the loss of rows that count, 0 of others.
    """
    from albireo.ops.softmax_triton import softmax_loss_kernel

    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(8192, 1 << max(7, (vocabulary - 1).bit_length()))
    with torch.cuda.device(logits.device):
        softmax_loss_kernel[(rows,)](
            logits,
            labels,
            keep,
            gradient,
            losses,
            vocabulary,
            logits.stride(0),
            gradient.stride(0),
            scale,
            BLOCK=block,
            num_warps=32 if block >= 8192 else 8,
        )
    return losses
