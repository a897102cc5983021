"""Adam on tensors, wherever they are, by torch's fused kernel: what `fused=True` calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from albireo.optim.adam_values import AdamValues

__all__ = ["fused_step"]


def fused_step(
    values: AdamValues,
    count: torch.Tensor,
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
) -> None:
    """Step weights and moments in place.

    Args:
        values: of the parameters' group.
        count: which step of theirs it is, from 1; an fp32 scalar beside them.
        weights: fp32, each of any shape.
        gradients: fp32, of the same shapes; only read.
        exp_avgs: the first moments, likewise.
        exp_avg_sqs: the second moments, likewise.
    """
    fused = torch._fused_adamw_ if values.decoupled else torch._fused_adam_
    fused(
        list(weights),
        list(gradients),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        [count] * len(weights),
        lr=values.lr,
        beta1=values.beta1,
        beta2=values.beta2,
        weight_decay=values.weight_decay,
        eps=values.eps,
        amsgrad=False,
        maximize=values.maximize,
    )
