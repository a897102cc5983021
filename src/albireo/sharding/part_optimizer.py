"""What optimizers over parts of parameters have in common."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from albireo.distributed import World
from albireo.errors import ConfigError
from albireo.optim import LossScale, OptimizerWrapper
from albireo.sharding.bucket import Fragment

__all__ = ["PartOptimizer"]

# Their steps are no function of each element alone, so a part of a parameter cannot be stepped without the rest.
_NOT_ELEMENT_WISE = ("LBFGS", "Adafactor", "Muon", "SparseAdam")


class PartOptimizer(OptimizerWrapper):
    """Wraps an element-wise torch optimizer, whose groups come to hold this rank's parts of the user's parameters.

    Args:
        optimizer: over the user's parameters.
        world: the ranks.
        loss_scale: for fp16.

    Raises:
        ConfigError: the optimizer is not element-wise.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, world: World, loss_scale: LossScale | None) -> None:
        self.check(optimizer)
        super().__init__(optimizer)
        self._world = world
        self._loss_scale = loss_scale
        self._stepping = False
        self._model_groups = [tuple(group["params"]) for group in optimizer.param_groups]
        optimizer.register_step_pre_hook(_refusal_of_other_steps(weakref.ref(self)))

    def _take_parts(self, fragments: Mapping[torch.Tensor, Fragment]) -> None:
        """Put this rank's parts into the groups, in place of the parameters."""
        for group in self.optim.param_groups:
            mine = [(place, fragments[p]) for place, p in enumerate(group["params"]) if p in fragments]
            group["params"] = [fragment.master for _, fragment in mine]
            if "param_names" in group:
                group["param_names"] = [group["param_names"][place] for place, _ in mine]

    @staticmethod
    def check(optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that cannot step a part of a parameter.

        Raises:
            ConfigError: with what to do instead.
        """
        for kind in type(optimizer).__mro__:
            if kind.__name__ in _NOT_ELEMENT_WISE:
                raise ConfigError(
                    f"{kind.__name__} steps a parameter as a whole, and sharding cuts parameters: take HybridAdam or "
                    "another element-wise optimizer, or TorchDDPPlugin"
                )

    def state_dict(self) -> NoReturn:
        """Refuse: this rank's part alone would be of no use.

        Raises:
            ConfigError: always; it says what to call.
        """
        raise ConfigError("a sharded optimizer is saved by booster.save_optimizer, which all ranks call")

    def load_state_dict(self, state_dict: dict[str, Any]) -> NoReturn:  # noqa: ARG002
        """Refuse: see `state_dict`.

        Raises:
            ConfigError: always; it says what to call.
        """
        raise ConfigError("a sharded optimizer is loaded by booster.load_optimizer, which all ranks call")

    def add_param_group(self, param_group: dict[str, Any]) -> NoReturn:  # noqa: ARG002
        """Refuse: what is sharded is settled when the model is boosted.

        Raises:
            ConfigError: always; it says what to do.
        """
        raise ConfigError("give the optimizer all its groups before boost: parameters cannot be sharded afterwards")

    def flush(self) -> None:
        """Finish steps that are still under way; there are none unless a subclass makes them."""

    @property
    def model_groups(self) -> list[tuple[nn.Parameter, ...]]:
        """The user's parameters, by group."""
        return self._model_groups

    def scaler_state(self) -> dict[str, float]:
        """Return the loss scale and its counts; waits for the device."""
        return {} if self._loss_scale is None else self._loss_scale.state()

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Put back what `scaler_state` returned."""
        if self._loss_scale is not None and state:
            self._loss_scale.load(state)


def _refusal_of_other_steps(wrapper: weakref.ref[PartOptimizer]) -> Callable[..., None]:
    """Return a hook that refuses steps that the wrapper does not make: the gradients are not where they would look."""

    def refuse(*_: Any) -> None:
        owner = wrapper()
        if owner is not None and not owner._stepping:  # noqa: SLF001  of this file
            raise RuntimeError("step the optimizer that boost returned: this one's gradients are not here")

    return refuse
