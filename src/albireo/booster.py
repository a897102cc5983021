"""The facade that users hold: one plugin, one way to boost a model, one training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from albireo.distributed import World, current_world
from albireo.optim import OptimizerWrapper
from albireo.plugins import ModelWrapper, Plugin

__all__ = ["Booster", "StepOutput"]


@dataclass(frozen=True)
class StepOutput:
    """What a training step leaves, on the device: reading a number waits for it.

    Attributes:
        loss_sum: this rank's loss, summed over its counted tokens; an fp32 scalar.
        tokens: how many tokens this rank counted.
        grad_norm: the gradient's global norm before clipping; an fp32 scalar, equal on every rank.
    """

    loss_sum: torch.Tensor
    tokens: int
    grad_norm: torch.Tensor


class Booster:
    """Trains a model with a plugin.

    Args:
        plugin: the mechanism.
        world: the ranks; those of the process group that this process has joined if None.
    """

    def __init__(self, plugin: Plugin, world: World | None = None) -> None:
        self.plugin = plugin
        self.world = world if world is not None else current_world()

    def boost(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[ModelWrapper, OptimizerWrapper | None]:
        """Wrap a model and its optimizer with the plugin.

        Args:
            model: a model on the device.
            optimizer: its optimizer.
        """
        return self.plugin.configure(model, optimizer, self.world)

    def backward(self, loss: torch.Tensor, optimizer: OptimizerWrapper) -> None:
        """Run backward through the plugin."""
        optimizer.backward(loss)

    def no_sync(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """Return a context in which gradients are added up locally."""
        return self.plugin.no_sync(model)

    def train_step(
        self,
        model: ModelWrapper,
        optimizer: OptimizerWrapper,
        micro_batches: Sequence[Mapping[str, torch.Tensor]],
        tokens: Sequence[int],
        *,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        max_norm: float = 0.0,
    ) -> StepOutput:
        """Forward, backward, clip and step: one optimizer step, the same for every plugin.

        The loss is the mean over all counted tokens of the global batch, over ranks and micro-batches: their number
        is added up before the first forward, and each micro-batch's sum is divided by it.

        Args:
            model: a boosted model whose forward returns the loss's sum and the count of tokens.
            optimizer: its boosted optimizer.
            micro_batches: each the keyword arguments of one forward, as tensors on the host or the device.
            tokens: how many tokens each micro-batch counts, known on the host so that nothing is waited for.
            lr_scheduler: stepped after the optimizer.
            max_norm: clip the gradient to this global norm; 0 does not.

        Returns:
            The losses' sum, the tokens and the norm, still on the device.

        Raises:
            ValueError: there is no micro-batch, or not one count for each.
        """
        if len(micro_batches) != len(tokens):
            raise ValueError(
                f"{len(micro_batches)} micro-batches came with {len(tokens)} counts of tokens: give one each"
            )
        if not micro_batches:
            raise ValueError("a step needs at least one micro-batch")
        mine = sum(tokens)
        factor = self._loss_factor(mine)
        sums = []
        last = len(micro_batches) - 1
        try:
            for index, batch in enumerate(micro_batches):
                with nullcontext() if index == last else self.no_sync(model):
                    loss_sum, _ = model(**self._to_device(batch))
                    self.backward(loss_sum * factor, optimizer)
                sums.append(loss_sum.detach())
        except BaseException:
            # What was added up so far must not go into the next step of a caller who takes a smaller batch instead.
            optimizer.zero_grad()
            raise
        norm = optimizer.clip_grad_by_norm(max_norm)
        optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()
        optimizer.zero_grad()
        return StepOutput(torch.stack(sums).sum(), mine, norm)

    def _loss_factor(self, tokens: int) -> torch.Tensor | float:
        """Return what turns this rank's sum into its part of the global mean; plugins average over ranks."""
        if self.world.world_size == 1:
            return 1.0 / max(tokens, 1)
        count = torch.tensor(float(tokens), dtype=torch.float32).to(self.world.device, non_blocking=True)
        return self.world.world_size / self.world.sum_in_place(count).clamp(min=1.0)

    def _to_device(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Move a batch, each tensor once however many names it goes by."""
        moved: dict[int, torch.Tensor] = {}
        for tensor in batch.values():
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(self.world.device, non_blocking=True)
        return {name: moved[id(tensor)] for name, tensor in batch.items()}
