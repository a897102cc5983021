"""The loss on data that is held out."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from albireo.data import Batch
from albireo.distributed import World
from albireo.errors import DataError
from albireo.plugins import ModelWrapper
from albireo.training.causal_lm import inputs_of

__all__ = ["evaluate"]


def evaluate(model: ModelWrapper, batches: Iterable[Batch], world: World) -> float:
    """Return the mean loss per token over every rank's batches.

    Args:
        model: a boosted model; each of its parts is left in the mode that it was in.
        batches: this rank's share; ranks may have different numbers of them.
        world: the ranks.

    Raises:
        DataError: no rank has a token that counts.
    """
    module = model.evaluation_module
    in_training = [part for part in module.modules() if part.training]
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    module.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                loss_sum, count = module(**inputs_of(batch.to(world.device, non_blocking=True)))
                sums += torch.stack([loss_sum.double(), count.double()])
    finally:
        for part in in_training:
            part.training = True
    loss, tokens = world.sum_in_place(sums).tolist()
    if tokens == 0:
        raise DataError("there is nothing to evaluate on: no token of the held-out data counts")
    return float(loss / tokens)
