"""An optimizer as the facade hands it out: it runs backward, clips and steps, with a loss scale where one is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from albireo.errors import ConfigError
from albireo.optim.norm import clip_by_norm, global_norm
from albireo.optim.overflow import leaves_out_by_flag

__all__ = ["OptimizerWrapper", "ScaledOptimizer"]


class OptimizerWrapper:
    """Wraps a torch optimizer, which `unwrap` gives out again. What is not here is asked of that one.

    Clip with `clip_grad_by_norm` or `clip_grad_by_value`, after the last backward of a step: under a loss scale,
    `torch.nn.utils.clip_grad_norm_` would see gradients that are larger by the scale.

    Args:
        optimizer: the optimizer.

    Attributes:
        optim: the optimizer.
        names: names of its parameters in the model, under which states are saved; those that have none go by their
            place in the groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optim = optimizer
        self.names: Mapping[torch.nn.Parameter, str] = {}
        self._grad_norm: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # Only called for what this object has not: `state`, `defaults`, `state_dict`, `add_param_group` and the like.
        if name == "optim":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.optim, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optim.param_groups

    @property
    def model_groups(self) -> Sequence[tuple[torch.nn.Parameter, ...]]:
        """The model's parameters, by group, whatever the optimizer steps in their place."""
        return [tuple(group["params"]) for group in self.optim.param_groups]

    def unwrap(self) -> torch.optim.Optimizer:
        """Return the torch optimizer."""
        return self.optim

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradients that there are, in the groups' order."""
        return [p.grad for group in self.optim.param_groups for p in group["params"] if p.grad is not None]

    def expect_step(self, max_norm: float) -> None:
        """Hear that the next backward is a step's last, and that the step follows with the values that groups have now.

        Args:
            max_norm: the bound to which gradients will be clipped; 0: none.
        """

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients to the parameters'.

        Args:
            loss: a scalar.
        """
        self._grad_norm = None
        torch.autograd.backward(loss)

    def clip_grad_by_norm(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Clip gradients by their global norm.

        Args:
            max_norm: the bound; 0 does not clip.
            norm_type: 2, the Euclidean norm.

        Returns:
            The norm before clipping, an fp32 scalar on the device.

        Raises:
            ConfigError: another norm is asked for.
        """
        if norm_type != 2.0:
            raise ConfigError(f"gradients are clipped by their Euclidean norm: norm_type is 2, not {norm_type}")
        gradients = self.gradients()
        norm = global_norm(gradients)
        if max_norm > 0:
            clip_by_norm(gradients, norm, max_norm)
        self._grad_norm = norm
        return norm

    def clip_grad_by_value(self, clip_value: float) -> None:
        """Clip each element of the gradients.

        Args:
            clip_value: elements come to lie between `-clip_value` and `clip_value`.
        """
        for gradient in self.gradients():
            gradient.clamp_(-clip_value, clip_value)

    def get_grad_norm(self) -> float | None:
        """Return the gradients' global norm of the last step; waits for the device.

        Returns:
            The norm before `clip_grad_by_norm`, if that was called; else that of the gradients as they are; None if
            there are no gradients any more.
        """
        if self._grad_norm is None:
            gradients = self.gradients()
            if not gradients:
                return None
            self._grad_norm = global_norm(gradients)
        return self._grad_norm.item()

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step the parameters.

        Args:
            closure: for optimizers that compute the loss anew.
        """
        if closure is None:
            self.optim.step()
        else:
            self.optim.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optim.zero_grad(set_to_none=set_to_none)

    def gradient_scale(self) -> torch.Tensor | None:
        """Return by what the gradients are larger than they should be, a scalar on the device; None: by nothing."""
        return None

    def abandon_step(self, *, reduced: bool = False) -> None:  # noqa: ARG002  where ranks share gradients, it matters
        """Forget a step that failed on this rank.

        Args:
            reduced: it failed after the last backward, so that no rank waits for this one's gradients.
        """
        self.zero_grad()

    def scaler_state(self) -> dict[str, float]:
        """Return the loss scale's state; empty where there is none."""
        return {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Put back what `scaler_state` returned."""


class ScaledOptimizer(OptimizerWrapper):
    """Steps under a dynamic loss scale (Micikevicius et al., 2018), for fp16.

    A gradient that is not finite leaves weights and states as they were, and halves the scale. A fused kernel itself
    looks at the flag, so that the host never waits to know.

    Args:
        optimizer: a torch optimizer, at best a fused one.
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
        self._device = device
        self._scaled = False
        self._unscaled = False

    def backward(self, loss: torch.Tensor) -> None:
        """Add the scaled loss's gradients to the parameters'.

        Raises:
            RuntimeError: the gradients so far have been unscaled.
        """
        if self._unscaled:
            raise RuntimeError(
                "backward was called on gradients that have been clipped: clip once, after the last backward of a step"
            )
        self._scaled = True
        super().backward(self._scaler.scale(loss))

    def clip_grad_by_norm(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Unscale the gradients, then clip them; see the base class."""
        self._unscale()
        return super().clip_grad_by_norm(max_norm, norm_type)

    def clip_grad_by_value(self, clip_value: float) -> None:
        """Unscale the gradients, then clip them; see the base class."""
        self._unscale()
        super().clip_grad_by_value(clip_value)

    def get_grad_norm(self) -> float | None:
        """See the base class; of scaled gradients it is the norm without the scale."""
        if self._grad_norm is None and self._scaled:
            self._unscale()
        return super().get_grad_norm()

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step the parameters unless a gradient is not finite, and set the next scale.

        Raises:
            RuntimeError: there was no backward through this optimizer, so that the gradients are not scaled.
            ConfigError: a closure is given.
        """
        if closure is not None:
            raise ConfigError("a loss scale and a closure do not go together: take fp32 or bf16 for this optimizer")
        self._unscale()
        with self._asked_on_the_host_if_need_be():
            self._scaler.step(self.optim)
        self._scaler.update()
        self._scaled = self._unscaled = False
        # A step that was left out for an overflow is a step to a schedule: torch is not to warn of a wrong order.
        vars(self.optim)["_opt_called"] = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        super().zero_grad(set_to_none)
        if self._unscaled:
            # No step came of these gradients, so the next ones are to be unscaled anew, with the scale as it is.
            self._scaler.update(self._scaler.get_scale())
        self._scaled = self._unscaled = False

    def gradient_scale(self) -> torch.Tensor | None:
        """See the base class: until they are clipped, gradients are larger by the loss scale."""
        if self._unscaled or not self._scaled:
            return None
        # The scaler tells its scale as a number alone, for which it waits.
        return self._scaler.scale(torch.ones((), device=self._device))

    def scaler_state(self) -> dict[str, float]:
        """Return the loss scale and the count of good steps; waits for the device."""
        return {key: float(value) for key, value in self._scaler.state_dict().items()}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Put back what `scaler_state` returned."""
        if state:
            whole = {"_growth_tracker", "growth_interval"}
            self._scaler.load_state_dict({key: int(v) if key in whole else v for key, v in state.items()})

    @contextmanager
    def _asked_on_the_host_if_need_be(self) -> Iterator[None]:
        """Have the scaler look at the flag itself where the optimizer's kernels would not, or would leave a trace."""
        stepped = [p for group in self.optim.param_groups for p in group["params"] if p.grad is not None]
        if leaves_out_by_flag(self.optim, stepped):
            yield
            return
        attributes = vars(self.optim)
        before = attributes.get("_step_supports_amp_scaling")
        attributes["_step_supports_amp_scaling"] = False
        try:
            yield
        finally:
            if before is None:
                del attributes["_step_supports_amp_scaling"]
            else:
                attributes["_step_supports_amp_scaling"] = before

    def _unscale(self) -> None:
        """Divide the gradients by the scale, once a step."""
        if not self._scaled:
            raise RuntimeError(
                "there are no scaled gradients: with fp16, call booster.backward(loss, optimizer), not loss.backward()"
            )
        if not self._unscaled:
            self._scaler.unscale_(self.optim)
            self._unscaled = True
