"""An optimizer as the facade hands it out: it runs backward, clips and steps, with a loss scale where one is needed."""

from __future__ import annotations

from typing import Any

import torch

from albireo.optim.norm import clip_by_norm, global_norm

__all__ = ["OptimizerWrapper", "ScaledOptimizer"]


class OptimizerWrapper:
    """Wraps a torch optimizer, which `unwrap` gives out again.

    Args:
        optimizer: the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optim = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optim.param_groups

    def unwrap(self) -> torch.optim.Optimizer:
        """Return the torch optimizer."""
        return self.optim

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradients that there are, in the groups' order."""
        return [p.grad for group in self.optim.param_groups for p in group["params"] if p.grad is not None]

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients to the parameters'.

        Args:
            loss: a scalar.
        """
        torch.autograd.backward(loss)

    def clip_grad_by_norm(self, max_norm: float) -> torch.Tensor:
        """Clip gradients by their global norm.

        Args:
            max_norm: the bound; 0 does not clip.

        Returns:
            The norm before clipping, an fp32 scalar on the device.
        """
        gradients = self.gradients()
        norm = global_norm(gradients)
        if max_norm > 0:
            clip_by_norm(gradients, norm, max_norm)
        return norm

    def step(self) -> None:
        """Step the parameters."""
        self.optim.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optim.zero_grad(set_to_none=set_to_none)

    def scaler_state(self) -> dict[str, float]:
        """Return the loss scale's state; empty where there is none."""
        return {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Put back what `scaler_state` returned."""


class ScaledOptimizer(OptimizerWrapper):
    """Steps under a dynamic loss scale (Micikevicius et al., 2018), for fp16.

    A gradient that is not finite leaves weights and states as they were, and halves the scale. The kernel itself looks
    at the flag, so that the host never waits to know.

    Args:
        optimizer: a fused torch optimizer.
        device: where the gradients are.
        initial_scale: the first loss scale.
        growth_interval: steps without overflow after which it doubles.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        initial_scale: float = 2.0**16,
        growth_interval: int = 1000,
    ) -> None:
        super().__init__(optimizer)
        self._scaler = torch.amp.GradScaler(device.type, init_scale=initial_scale, growth_interval=growth_interval)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the scaled loss's gradients to the parameters'."""
        torch.autograd.backward(self._scaler.scale(loss))

    def clip_grad_by_norm(self, max_norm: float) -> torch.Tensor:
        """Unscale the gradients, then clip them; see the base class."""
        self._scaler.unscale_(self.optim)
        return super().clip_grad_by_norm(max_norm)

    def step(self) -> None:
        """Step the parameters unless a gradient is not finite, and set the next scale."""
        self._scaler.step(self.optim)
        self._scaler.update()

    def scaler_state(self) -> dict[str, float]:
        """Return the loss scale and the count of good steps; waits for the device."""
        return {key: float(value) for key, value in self._scaler.state_dict().items()}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Put back what `scaler_state` returned."""
        if state:
            whole = {"_growth_tracker", "growth_interval"}
            self._scaler.load_state_dict({key: int(v) if key in whole else v for key, v in state.items()})
