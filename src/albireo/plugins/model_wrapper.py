"""What a plugin makes of a user's model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

__all__ = ["Criterion", "ModelWrapper"]

Criterion = Callable[..., torch.Tensor]


class ModelWrapper(nn.Module):
    """A model under a plugin: called like the model itself.

    Args:
        module: what the plugin made of the user's model.
        original: the user's model.
        evaluation_module: what to call where nothing is trained, such as the module without its gradients' reducer.

    Attributes:
        module: what the plugin made of the user's model.
        criterion: the user's, which computes the loss of a training step from outputs and labels, if the model does not.
        loss_function: the criterion in the plugin's precision.
    """

    criterion: Criterion | None
    loss_function: Criterion | None

    def __init__(self, module: nn.Module, original: nn.Module, *, evaluation_module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module
        # Kept out of the registry of submodules: its parameters are the same, and must not count twice.
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_evaluation_module", module if evaluation_module is None else evaluation_module)
        self.use_criterion(None, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    def use_criterion(self, criterion: Criterion | None, loss_function: Criterion | None) -> None:
        """Set what computes the loss of a training step."""
        # Not submodules: weights of classes, or a teacher, are no part of the model.
        object.__setattr__(self, "criterion", criterion)
        object.__setattr__(self, "loss_function", loss_function)

    @property
    def evaluation_module(self) -> nn.Module:
        """The module to call where nothing is trained."""
        return cast("nn.Module", self._evaluation_module)

    def unwrap(self) -> nn.Module:
        """Return the user's model."""
        return cast("nn.Module", self._original)

    def weight_tensors(self) -> Iterator[torch.Tensor]:
        """Yield what holds weights on this rank; several may share memory."""
        yield from self.unwrap().parameters()

    def streamed_parameters(self) -> Iterable[nn.Parameter]:
        """Return parameters whose states are on the host, and are stepped on the device that computes all the same."""
        return ()
