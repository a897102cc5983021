"""An optimizer that steps this rank's rows of parameters that FSDP2 shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from albireo.distributed import World
from albireo.distributed.collectives import sum_in_rank_order
from albireo.errors import ConfigError
from albireo.optim import LossScale, clip_by_norm, global_norm
from albireo.optim.overflow import step_unless
from albireo.plugins.fully_sharded import FullyShardedModule, local_part
from albireo.sharding import Fragment, PartOptimizer

__all__ = ["FullyShardedOptimizer"]


class FullyShardedOptimizer(PartOptimizer):
    """Wraps an element-wise torch optimizer; its groups come to hold this rank's rows, as plain 1-D tensors.

    Args:
        optimizer: over parameters of the model.
        model: the sharded model.
        world: the ranks.
        loss_scale: for fp16.

    Raises:
        ConfigError: the optimizer is not element-wise, or has states already.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: FullyShardedModule,
        world: World,
        *,
        loss_scale: LossScale | None = None,
    ) -> None:
        super().__init__(optimizer, world, loss_scale)
        self._model = model
        self._unsettled = self._scaled = self._unscaled = False
        self._take_parts(model.fragments)

    @staticmethod
    def check(optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that cannot step a part of a parameter, or that has begun.

        Raises:
            ConfigError: with what to do instead.
        """
        PartOptimizer.check(optimizer)
        if optimizer.state:
            raise ConfigError(
                f"this {type(optimizer).__name__} has states already, which torch's FSDP would lose: boost it first, then "
                "booster.load_optimizer, or take LowLevelZeroPlugin"
            )

    @property
    def fragments(self) -> Iterator[Fragment]:
        """What this rank steps, in the groups' order."""
        for parameters in self._model_groups:
            yield from (self._model.fragments[p] for p in parameters if p in self._model.fragments)

    def gradients(self) -> list[torch.Tensor]:
        """Return this rank's gradients, 1-D, in the groups' order; a collective call after a backward."""
        self._settle()
        return super().gradients()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients, averaged over ranks unless they are kept local.

        Args:
            loss: a scalar.

        Raises:
            RuntimeError: the gradients so far have been unscaled.
        """
        if self._unscaled:
            raise RuntimeError(
                "backward was called on gradients that have been clipped: clip once, after the last backward of a step"
            )
        self._grad_norm = None
        if self._loss_scale is not None:
            self._scaled = True
            loss = loss * self._loss_scale.value
        try:
            super().backward(loss)
        except BaseException:
            self._model.recover()
            raise
        self._model.note_reduced()
        self._unsettled = True

    def clip_grad_by_norm(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Unscale the gradients, then clip them by their global norm; see the base class."""
        if norm_type != 2.0:
            raise ConfigError(f"gradients are clipped by their Euclidean norm: norm_type is 2, not {norm_type}")
        self._unscale()
        norm = self._norm()
        if max_norm > 0:
            clip_by_norm(self.gradients(), norm, max_norm)
        return norm.to(self._world.device, non_blocking=True)

    def clip_grad_by_value(self, clip_value: float) -> None:
        """Unscale the gradients, then clip them; see the base class."""
        self._unscale()
        super().clip_grad_by_value(clip_value)

    def get_grad_norm(self) -> float | None:
        """Return the gradients' global norm; waits for the device, and for no other rank.

        Returns:
            The norm before clipping of what was last clipped; None if there are no gradients, or if over several ranks
            they have not been clipped yet.
        """
        if self._grad_norm is None and self._world.world_size == 1 and self.gradients():
            self._unscale()
            self._norm()
        return None if self._grad_norm is None else float(self._grad_norm)

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step this rank's rows.

        Raises:
            ConfigError: a closure is given.
            RuntimeError: in fp16, there was no backward through this optimizer, so that the gradients are not scaled.
        """
        if closure is not None:
            raise ConfigError("a sharded optimizer takes no closure: run backward first, then step")
        if self._loss_scale is not None and not self._scaled:
            raise RuntimeError(
                "there are no scaled gradients: with fp16, call booster.backward(loss, optimizer), not loss.backward()"
            )
        self._settle()
        self._unscale()
        # Whole weights that some forward has left behind would be used again in the next, old as they are.
        self._model.reshard()
        self._stepping = True
        try:
            if self._loss_scale is None:
                self.optim.step()
            else:
                overflow = (~torch.isfinite(self._norm())).float()
                step_unless(self.optim, overflow)
                self._loss_scale.update(overflow.to(self._loss_scale.value.device))
        finally:
            self._stepping = False
        self._scaled = self._unscaled = False
        # A step that was left out for an overflow is a step to a schedule: torch is not to warn of a wrong order.
        vars(self.optim)["_opt_called"] = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self._model.forget_local()
        for parameters in self._model_groups:
            for parameter in parameters:
                parameter.grad = None
        self.optim.zero_grad()
        self._forget_use()
        self._grad_norm = None
        self._unsettled = self._scaled = self._unscaled = False

    def gradient_scale(self) -> torch.Tensor | None:
        """See the base class: until they are clipped, gradients are larger by the loss scale."""
        return None if self._loss_scale is None or self._unscaled or not self._scaled else self._loss_scale.value

    def _settle(self) -> None:
        """After a backward: agree on what has no gradient, and show the optimizer this rank's rows of the others."""
        if self._unsettled:
            self._unsettled = False
            self._drop_unused()
        # Also for those who assign to a parameter's gradient themselves.
        for fragment in self.fragments:
            gradient = fragment.parameter.grad
            fragment.master.grad = None if gradient is None else local_part(gradient)

    def _drop_unused(self) -> None:
        """Let go of gradients that are zeros because no rank used the parameter: it is to be skipped, as in torch."""
        used = self._model.used
        if used:
            flags = torch.tensor(list(used.values()), dtype=torch.float32)
            for parameter, count in zip(used, self._world.sum_in_place(flags).tolist(), strict=True):
                if count == 0:
                    parameter.grad = None

    def _forget_use(self) -> None:
        for parameter in self._model.used:
            self._model.used[parameter] = False

    def _unscale(self) -> None:
        """Divide the gradients by the loss scale, once a step, and take their norm while an overflow is to be seen."""
        if self._loss_scale is None or self._unscaled or not self._scaled:
            return
        gradients = self.gradients()
        if gradients:
            torch._foreach_mul_(gradients, self._loss_scale.value.reciprocal().to(gradients[0].device))
        self._unscaled = True
        self._norm()

    def _norm(self) -> torch.Tensor:
        """Return the global norm of the step's gradients as they were before clipping, beside the gradients."""
        if self._grad_norm is None:
            gradients = self.gradients()
            # Gradients of an offloaded model are on the host.
            device = next((part.device for part in self._model.fragments), self._world.device)
            world = replace(self._world, device=device)
            self._grad_norm = global_norm(gradients, lambda squares: sum_in_rank_order(squares, world))
        return self._grad_norm
