"""A model of pictures as the training step calls it, what it comes to on pictures that are held out, and its plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from albireo.data import IGNORED_LABEL, AnyBatch, PictureBatch, PictureForm
from albireo.distributed import World
from albireo.errors import DataError
from albireo.plugins import ModelWrapper
from albireo.training.evaluation import evaluating
from albireo.training.recipe import Evaluation, TaskModel

__all__ = ["PictureModel", "evaluate_pictures", "picture_inputs", "predict"]


class PictureModel(TaskModel):
    """Wraps a transformers model that tells classes of pictures apart.

    Args:
        model: the model; it keeps its own parameters and names, and saves itself.
        form: how bytes become what it reads.
        projection: the layer that reads them, whose dtype is what computes.
    """

    def __init__(self, model: PreTrainedModel, form: PictureForm, projection: nn.Module) -> None:
        super().__init__()
        self.network = model
        self._form = form
        # Not a second place in the registry.
        object.__setattr__(self, "_projection", projection)

    @property
    def pretrained(self) -> PreTrainedModel:
        """The transformers model."""
        return self.network

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss's sum over counted pictures, and their count; in evaluation each one's likeliest class too.

        Args:
            pixel_values: uint8, [batch, 3, height, width].
            labels: int64, [batch]; -100 is not counted.

        Returns:
            An fp32 and an int64 scalar; and int64, [batch].
        """
        projection = cast("nn.Module", self._projection)
        read = self._form.normalised(pixel_values).to(next(projection.parameters()).dtype)
        logits = self.network(pixel_values=read).logits
        loss_sum = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
        count = (labels != IGNORED_LABEL).sum()
        if self.training:
            return loss_sum, count
        return loss_sum, count, logits.argmax(dim=-1)


def picture_inputs(batch: AnyBatch) -> dict[str, torch.Tensor]:
    """Return a batch as the arguments of the model's forward.

    Raises:
        TypeError: it is no batch of pictures.
    """
    if not isinstance(batch, PictureBatch):
        raise TypeError(f"expected a batch of pictures, not a {type(batch).__name__}")
    return {"pixel_values": batch.pixel_values, "labels": batch.labels}


def evaluate_pictures(model: ModelWrapper, batches: Iterable[AnyBatch], world: World, classes: int) -> Evaluation:
    """Return the mean loss, the share that is right, and how often each class is taken for each.

    Args:
        model: a boosted model; each of its parts is left in the mode that it was in.
        batches: this rank's share; over all ranks each picture counts once.
        world: the ranks.
        classes: how many there are.

    Raises:
        DataError: no rank has a picture that counts.
    """
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    taken = torch.zeros(classes * classes, dtype=torch.float64, device=world.device)
    with evaluating(model) as module:
        for batch in batches:
            inputs = picture_inputs(batch.to(world.device, non_blocking=True))
            loss_sum, _, predicted = module(**inputs)
            counted = inputs["labels"] != IGNORED_LABEL
            pairs = inputs["labels"][counted] * classes + predicted[counted]
            taken += torch.bincount(pairs, minlength=taken.numel())
            loss += loss_sum.double()
    total, *counts = world.sum_in_place(torch.cat([loss.view(1), taken])).tolist()
    pictures = sum(counts)
    if pictures == 0:
        raise DataError("there is nothing to evaluate on: no picture is held out")
    confusion = tuple(
        tuple(int(count) for count in counts[row * classes : (row + 1) * classes]) for row in range(classes)
    )
    right = sum(confusion[label][label] for label in range(classes))
    return Evaluation(total / pictures, right / pictures, confusion)


def predict(model: ModelWrapper, batch: PictureBatch, device: torch.device) -> list[int]:
    """Return the likeliest class of each picture of a batch; every rank calls this, with the same batch.

    Args:
        model: a boosted model.
        batch: the pictures.
        device: where it computes.
    """
    with evaluating(model) as module:
        predicted: list[int] = module(**picture_inputs(batch.to(device)))[2].tolist()
    return predicted
