"""The facade that users hold: one plugin, one way to boost a model, one training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, overload

import torch
from torch import nn

from albireo.distributed import World, current_world
from albireo.errors import ConfigError
from albireo.models import lazy_source_of
from albireo.ops import count_terms, sum_of_loss
from albireo.optim import OptimizerWrapper
from albireo.plugins import Criterion, ModelWrapper, Plugin, TorchDDPPlugin
from albireo.plugins.lora_door import LoraDoor
from albireo.plugins.state_door import StateDoor
from albireo.plugins.step_beginning import StepBeginning
from albireo.sharding.weight_source import WeightSource

__all__ = ["Booster", "StepOutput"]

MicroBatch = Mapping[str, Any]
# Of a step that runs out of memory.
_ATTEMPTS = 4


@dataclass(frozen=True)
class StepOutput:
    """What a training step leaves, on the device: reading a number waits for it.

    Attributes:
        loss_sum: this rank's loss, summed over its counted tokens; an fp32 scalar.
        tokens: how many tokens this rank counted; samples, where a loss counts those.
        grad_norm: the gradient's global norm before clipping; an fp32 scalar, equal on every rank.
    """

    loss_sum: torch.Tensor
    tokens: int
    grad_norm: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """This rank's mean loss, an fp32 scalar."""
        return self.loss_sum / max(self.tokens, 1)


class Booster(StateDoor, LoraDoor):
    """Trains a model with a plugin; saves and loads it, see `StateDoor`, and knows adapters, see `LoraDoor`.

    Args:
        device: what to compute on; the rank's own device if None.
        mixed_precision: "fp32", "fp16" or "bf16"; the plugin's if None.
        plugin: the mechanism; `TorchDDPPlugin()` if None.
        world: the ranks; those of the process group that this process has joined if None.

    Attributes:
        plugin: the mechanism.
        world: the ranks.

    Raises:
        ConfigError: there is no such device or precision, or the plugin has another precision.
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        mixed_precision: str | None = None,
        plugin: Plugin | None = None,
        *,
        world: World | None = None,
    ) -> None:
        if isinstance(device, Plugin):
            raise ConfigError("give the plugin by its name: Booster(plugin=...)")
        self.plugin = plugin if plugin is not None else TorchDDPPlugin()
        if mixed_precision is not None:
            self.plugin.choose_precision(mixed_precision)
        self.world = _on_device(world if world is not None else current_world(), device)

    @overload
    def boost(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Criterion | None = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
        *,
        weights: WeightSource | None = None,
    ) -> tuple[ModelWrapper, OptimizerWrapper, Any, Any, Any]: ...

    @overload
    def boost(
        self,
        model: nn.Module,
        optimizer: None = None,
        criterion: Criterion | None = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
        *,
        weights: WeightSource | None = None,
    ) -> tuple[ModelWrapper, None, Any, Any, Any]: ...

    def boost(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        criterion: Criterion | None = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
        *,
        weights: WeightSource | None = None,
    ) -> tuple[ModelWrapper, OptimizerWrapper | None, Any, Any, Any]:
        """Move a model to the device, and wrap it and its optimizer with the plugin.

        Args:
            model: any module; one that takes keyword arguments for `train_step`.
            optimizer: a torch optimizer of its parameters.
            criterion: computes the loss from outputs and labels.
            dataloader: passed through, as `plugin.prepare_dataloader` or anybody else made it.
            lr_scheduler: passed through; one of torch's, made with `optimizer` itself.
            weights: the first weights of a model whose parameters have no memory yet; None: what `LazyInitContext` has
                written down, if it was built within one.

        Returns:
            The five in this order: the model, called as before; the optimizer; the criterion, which computes in the
            plugin's precision; the loader; the schedule.

        Raises:
            ConfigError: the model is boosted already.
        """
        if isinstance(model, ModelWrapper) or isinstance(optimizer, OptimizerWrapper):
            raise ConfigError("this model or optimizer is boosted already: give boost the user's own")
        if weights is None:
            weights = lazy_source_of(model)
        self.plugin.place(model, self.world.device, weights)
        boosted, wrapped = self.plugin.configure(model, optimizer, self.world, weights=weights)
        if optimizer is not None and wrapped is not None:
            if optimizer.state:
                # They were there before the model moved, and follow it as torch has it when it loads them.
                optimizer.load_state_dict(optimizer.state_dict())
            wrapped.names = {parameter: name for name, parameter in model.named_parameters()}
        loss_function = None
        if criterion is not None:
            if isinstance(criterion, nn.Module):
                criterion.to(self.world.device)
            loss_function = self.plugin.configure_criterion(criterion, self.world)
            boosted.use_criterion(criterion, loss_function)
        return boosted, wrapped, loss_function, dataloader, lr_scheduler

    def backward(self, loss: torch.Tensor, optimizer: OptimizerWrapper) -> None:
        """Run backward through the plugin."""
        optimizer.backward(loss)

    def no_sync(
        self,
        model: ModelWrapper | None = None,
        optimizer: OptimizerWrapper | None = None,  # noqa: ARG002  scripts pass it
    ) -> AbstractContextManager[None]:
        """Return a context in which gradients are added up locally: for all micro-batches of a step but the last.

        Args:
            model: the boosted model.
            optimizer: not needed by any plugin so far.

        Raises:
            ConfigError: no model is given.
        """
        if model is None:
            raise ConfigError("no_sync needs the model: booster.no_sync(model)")
        return self.plugin.no_sync(model)

    def execute_pipeline(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Refuse: there is no pipeline.

        Raises:
            ConfigError: always; it says what to call.
        """
        raise ConfigError(
            f"{self.plugin.name} has no pipeline: call booster.train_step(model, optimizer, micro_batches), which does "
            "forward, backward, clip and step for every plugin"
        )

    def train_step(
        self,
        model: ModelWrapper,
        optimizer: OptimizerWrapper,
        micro_batches: MicroBatch | Sequence[MicroBatch],
        tokens: int | Sequence[int] | None = None,
        *,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        max_norm: float = 0.0,
        observe: Callable[[Literal["reduced", "clipped"]], None] | None = None,
    ) -> StepOutput:
        """Forward, backward, clip and step: one optimizer step, the same for every plugin.

        The loss is the mean over all that is counted in the global batch, over ranks and micro-batches: the counts are
        added up before the first forward, and each micro-batch's sum is divided by the total.

        Args:
            model: a boosted model. Its forward returns something with the mean loss as its `loss`, or the loss's sum
                and the count of tokens; or boost was given a criterion, which is called with the outputs and the
                batch's `labels`.
            optimizer: its boosted optimizer.
            micro_batches: each the keyword arguments of one forward, with tensors on the host or the device; or a
                single one.
            tokens: how many terms each micro-batch's loss is a mean of; if None they are counted, see
                `albireo.ops.count_terms`, which waits for nothing as long as labels are on the host.
            lr_scheduler: stepped after the optimizer.
            max_norm: clip the gradient to this global norm; 0 does not.
            observe: called twice before the step, with "reduced" when the gradients of all micro-batches and ranks are
                there, and with "clipped" when they are as they are stepped.

        Returns:
            The losses' sum, the tokens and the norm, still on the device.

        Raises:
            ValueError: there is no micro-batch, or not one count for each.
            ConfigError: the model returns no loss, or nothing tells the count.
        """
        batches, counts = _micro_batches(model, micro_batches, tokens)
        mine = sum(counts)
        factor = self._loss_factor(mine, len(batches))
        sums = self._backwards(model, optimizer, batches, [(count, factor) for count in counts], max_norm)
        try:
            if observe is not None:
                observe("reduced")
            norm = optimizer.clip_grad_by_norm(max_norm)
            if observe is not None:
                observe("clipped")
            optimizer.step()
        except BaseException:
            optimizer.abandon_step(reduced=True)
            raise
        if lr_scheduler is not None:
            lr_scheduler.step()
        optimizer.zero_grad()
        return StepOutput(torch.stack(sums).sum(), mine, norm)

    def _backwards(
        self,
        model: ModelWrapper,
        optimizer: OptimizerWrapper,
        batches: Sequence[MicroBatch],
        weights: Sequence[tuple[int, float]],
        max_norm: float,
    ) -> list[torch.Tensor]:
        """Add up the gradients of all micro-batches, and return the losses' sums.

        Where memory runs out and the plugin can do with less, all is made again, with the numbers it would have had.
        """
        last = len(batches) - 1
        for left in reversed(range(_ATTEMPTS)):
            beginning = StepBeginning(model.unwrap(), self.world.device) if self.plugin.repeats_steps else None
            sums = []
            try:
                for index, (batch, (count, factor)) in enumerate(zip(batches, weights, strict=True)):
                    with nullcontext() if index == last else self.plugin.accumulation_context(model):
                        loss_sum = _loss_sum(model, self._to_device(batch), count)
                        if index == last:
                            optimizer.expect_step(max_norm)
                        self.backward(loss_sum * factor, optimizer)
                    sums.append(loss_sum.detach())
            except BaseException as error:
                # What was added up so far must not go into the next step of a caller who takes a smaller batch instead.
                optimizer.abandon_step()
                ran_out = isinstance(error, torch.OutOfMemoryError) and left > 0
                if not ran_out or beginning is None or not beginning.is_unchanged or not self.plugin.make_room(model):
                    raise
            else:
                break
            # Only now: an error holds what was computed.
            beginning.restore()
        return sums

    def _loss_factor(self, tokens: int, micro_batches: int) -> float:
        """Return what turns this rank's sum into its part of the global mean; plugins average over ranks."""
        if self.world.world_size == 1:
            return 1.0 / max(tokens, 1)
        # Between hosts: no device is waited for.
        told = self.world.gather_numbers([tokens, micro_batches])
        counts = {int(count) for _, count in told}
        if len(counts) > 1 and not self.plugin.takes_uneven_micro_batches:
            raise ConfigError(
                f"ranks came with {min(counts)} to {max(counts)} micro-batches, and {self.plugin.name} reduces after each: "
                "give every rank as many"
            )
        return self.world.world_size / max(sum(count for count, _ in told), 1.0)

    def _to_device(self, batch: MicroBatch) -> dict[str, Any]:
        """Move a batch, each tensor once however many names it goes by."""
        moved: dict[int, torch.Tensor] = {}
        for value in batch.values():
            if isinstance(value, torch.Tensor) and id(value) not in moved:
                moved[id(value)] = value.to(self.world.device, non_blocking=True)
        return {name: moved.get(id(value), value) for name, value in batch.items()}


def _on_device(world: World, device: str | torch.device | None) -> World:
    if device is None:
        return world
    chosen = torch.device(device)
    if chosen.type == world.device.type and chosen.index in (None, world.device.index):
        return world
    if chosen.type == "cpu":
        return dataclasses.replace(world, device=chosen)
    raise ConfigError(f"this rank computes on {world.device}, not on {device}: leave device out, or give 'cpu'")


def _micro_batches(
    model: ModelWrapper, micro_batches: MicroBatch | Sequence[MicroBatch], tokens: int | Sequence[int] | None
) -> tuple[Sequence[MicroBatch], Sequence[int]]:
    """Return the micro-batches, and how many terms the loss of each is a mean of."""
    batches = [micro_batches] if isinstance(micro_batches, Mapping) else list(micro_batches)
    if not batches:
        raise ValueError("a step needs at least one micro-batch")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"a micro-batch is a mapping of the forward's arguments, not a {type(batch).__name__}: make it a dict"
            )
    if tokens is None:
        counts = [count_terms(batch, model.unwrap(), model.criterion) for batch in batches]
    else:
        counts = [tokens] if isinstance(tokens, int) else list(tokens)
    if len(batches) != len(counts):
        raise ValueError(f"{len(batches)} micro-batches came with {len(counts)} counts of tokens: give one each")
    return batches, counts


def _loss_sum(model: ModelWrapper, batch: dict[str, Any], count: int) -> torch.Tensor:
    if model.loss_function is None:
        return sum_of_loss(model(**batch), count)
    if "labels" not in batch:
        raise ConfigError(f"the criterion needs labels, and the batch has only {', '.join(batch)}")
    labels = batch.pop("labels")
    return sum_of_loss(model.loss_function(model(**batch), labels), count, model.criterion)
