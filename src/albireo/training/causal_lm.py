"""A causal language model as the training step calls it: a backbone, and a head that never holds all logits."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from albireo.data import Batch
from albireo.models import Family
from albireo.ops import linear_cross_entropy
from albireo.training.recipe import TaskModel

__all__ = ["CausalLanguageModel", "inputs_of"]


def inputs_of(batch: Batch) -> dict[str, torch.Tensor]:
    """Return a batch as the arguments of the model's forward."""
    return {"input_ids": batch.input_ids, "labels": batch.labels}


class _LossHead(nn.Module):
    """The output projection and the loss in one: a module, so that hooks fire on it as on any block."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return linear_cross_entropy(hidden, self.projection.weight, labels, bias=self.projection.bias, shift=True)


class CausalLanguageModel(TaskModel):
    """Wraps a transformers model of a family as {backbone, head}.

    Args:
        model: the model; it keeps its own parameters and names, and saves itself.
        family: what tells its parts.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        super().__init__()
        self.backbone = family.backbone(model)
        self.head = _LossHead(family.head(model))
        self._family = family
        # Not a submodule: its parameters are those of backbone and head.
        object.__setattr__(self, "_model", model)

    @property
    def pretrained(self) -> PreTrainedModel:
        """The transformers model."""
        return cast("PreTrainedModel", self._model)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss's sum over counted tokens, and their count.

        Args:
            input_ids: token ids [batch, sequence], without padding.
            labels: the same ids [batch, sequence]; -100 is not counted. Position t predicts position t + 1.

        Returns:
            An fp32 scalar and an int64 scalar.
        """
        hidden = self.backbone(**self._family.forward_arguments(input_ids)).last_hidden_state
        loss_sum, count = self.head(hidden, labels)
        return loss_sum, count
