"""Losses as sums over what they count, so that means over ranks and micro-batches can be exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from albireo.errors import ConfigError

__all__ = ["count_terms", "sum_of_loss"]

_IGNORED = -100
# transformers' names of the losses that compare position t with the label at t + 1.
_SHIFTED_LOSSES = frozenset({None, "ForCausalLM", "ForConditionalGeneration"})


def count_terms(batch: Mapping[str, Any], model: torch.nn.Module, criterion: object = None) -> int:
    """Return how many terms the mean of a batch's loss is taken over.

    With `labels`: those that are not -100. Whole numbers of two dimensions, [batch, sequence], are a language model's,
    whose first position is not predicted; not so where a transformers model says that it does not shift them, or with a
    loss of torch's own as criterion. Of labels of floating point all are counted. Without labels: the samples.

    Args:
        batch: a micro-batch. Labels on the host are counted at once, labels on a device are waited for.
        model: whose loss it is.
        criterion: what computes the loss instead of the model.

    Raises:
        ConfigError: nothing in the batch tells, or the mean is one weighted by class.
    """
    labels = batch.get("labels")
    ignored = getattr(criterion, "ignore_index", None)
    if ignored is not None and getattr(criterion, "weight", None) is not None and _is_mean(criterion):
        raise ConfigError(
            "a mean weighted by class has no count that ranks could add up: give the criterion reduction='sum'"
        )
    if not isinstance(labels, torch.Tensor):
        sizes = [value.shape[0] for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim > 0]
        if not sizes:
            raise ConfigError("a micro-batch without tensors says nothing of its size: give train_step tokens=[...]")
        return int(sizes[0])
    if labels.is_floating_point():
        return labels.numel()
    if labels.ndim == 2 and _shifts(model, criterion):
        labels = labels[:, 1:]
    return int((labels != (_IGNORED if ignored is None else ignored)).sum())


def sum_of_loss(output: Any, count: int, criterion: object = None) -> torch.Tensor:
    """Return the sum of a micro-batch's loss over what it counts.

    Args:
        output: a loss's sum and count, as a pair; a mean; or something with a mean as its `loss`.
        count: how many terms the mean was taken over.
        criterion: what computed a mean, or, if its `reduction` is "sum", a sum.

    Returns:
        A scalar of fp32 at least; of a mean over nothing it is 0, and so are its gradients.

    Raises:
        ConfigError: there is no loss, or no scalar.
    """
    if isinstance(output, tuple) and len(output) == 2 and not hasattr(output, "loss") and criterion is None:
        loss, counted = output
        if isinstance(loss, torch.Tensor) and isinstance(counted, torch.Tensor) and loss.ndim == counted.ndim == 0:
            return loss
    loss = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise ConfigError(
            f"the model returned no loss, but a {type(output).__name__}: put labels into the batch, so that it has a "
            "`.loss`, or give boost a criterion"
        )
    if loss.ndim != 0:
        raise ConfigError(f"the loss has shape {tuple(loss.shape)}: a scalar is needed, the mean over the batch")
    loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
    if not _is_mean(criterion):
        return loss
    total = loss * count
    # 0 / 0 is not 0, though nothing was lost; and a step adds the sums of all its micro-batches.
    return total if count else torch.where(total.isnan(), torch.zeros_like(total), total)


def _is_mean(criterion: object) -> bool:
    return getattr(criterion, "reduction", "mean") != "sum"


def _shifts(model: torch.nn.Module, criterion: object) -> bool:
    if criterion is not None:
        return not type(criterion).__module__.startswith("torch.nn.")
    loss_type = getattr(model, "loss_type", None)
    return loss_type in _SHIFTED_LOSSES and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
