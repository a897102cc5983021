"""The loss on data that is held out."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from albireo.data import Batch
from albireo.distributed import World
from albireo.plugins import ModelWrapper
from albireo.training.causal_lm import inputs_of

__all__ = ["evaluate"]


def evaluate(model: ModelWrapper, batches: Iterable[Batch], world: World) -> float:
    """Return the mean loss per token over every rank's batches.

    Args:
        model: a boosted model; it is left in training mode.
        batches: this rank's share; ranks may have different numbers of them.
        world: the ranks.
    """
    module = model.evaluation_module
    module.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    with torch.no_grad():
        for batch in batches:
            loss_sum, count = module(**inputs_of(batch.to(world.device, non_blocking=True)))
            sums += torch.stack([loss_sum.double(), count.double()])
    module.train()
    loss, tokens = world.sum_in_place(sums).tolist()
    return float(loss / tokens)
