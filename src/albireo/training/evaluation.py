"""The loss on data that is held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from albireo.data import Batch
from albireo.distributed import World
from albireo.errors import DataError
from albireo.plugins import ModelWrapper
from albireo.training.causal_lm import inputs_of

__all__ = ["evaluate", "evaluating"]


@contextmanager
def evaluating(model: ModelWrapper) -> Iterator[nn.Module]:
    """Give what to call where nothing is trained, in evaluation mode and without gradients.

    Args:
        model: a boosted model; each of its parts is left in the mode that it was in.
    """
    module = model.evaluation_module
    in_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        for part in in_training:
            part.training = True


def evaluate(model: ModelWrapper, batches: Iterable[Batch], world: World) -> float:
    """Return the mean loss per token over every rank's batches.

    Args:
        model: a boosted model; each of its parts is left in the mode that it was in.
        batches: this rank's share; ranks may have different numbers of them.
        world: the ranks.

    Raises:
        DataError: no rank has a token that counts.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    with evaluating(model) as module:
        for batch in batches:
            loss_sum, count = module(**inputs_of(batch.to(world.device, non_blocking=True)))
            sums += torch.stack([loss_sum.double(), count.double()])
    loss, tokens = world.sum_in_place(sums).tolist()
    if tokens == 0:
        raise DataError("there is nothing to evaluate on: no token of the held-out data counts")
    return float(loss / tokens)
