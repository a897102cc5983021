"""What every plugin does for the facade."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn

from albireo.checkpoint import Checkpoint, TensorSlice
from albireo.distributed import World
from albireo.optim import OptimizerWrapper

__all__ = ["ModelWrapper", "Plugin"]


class ModelWrapper(nn.Module):
    """A model under a plugin: called like the model itself.

    Args:
        module: what the plugin made of the user's model.
        original: the user's model.
        evaluation_module: what to call where nothing is trained, such as the module without its gradients' reducer.
    """

    def __init__(self, module: nn.Module, original: nn.Module, *, evaluation_module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module
        # Kept out of the registry of submodules: its parameters are the same, and must not count twice.
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_evaluation_module", module if evaluation_module is None else evaluation_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    @property
    def evaluation_module(self) -> nn.Module:
        """The module to call where nothing is trained."""
        return cast("nn.Module", self._evaluation_module)

    def unwrap(self) -> nn.Module:
        """Return the user's model."""
        return cast("nn.Module", self._original)


class Plugin(ABC):
    """A way to train. The same calls serve every plugin; what differs is where weights, gradients and states live."""

    name: str
    precision: str

    @abstractmethod
    def configure(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, world: World
    ) -> tuple[ModelWrapper, OptimizerWrapper | None]:
        """Wrap a model and its optimizer.

        Args:
            model: the user's model, on the world's device.
            optimizer: its optimizer, or None for evaluation alone.
            world: the ranks.
        """

    @abstractmethod
    def no_sync(self, model: ModelWrapper) -> AbstractContextManager[None]:
        """Return a context in which backward adds to local gradients and sends nothing."""

    @abstractmethod
    def export_state(
        self, model: ModelWrapper, optimizer: OptimizerWrapper | None, names: Mapping[torch.Tensor, str], world: World
    ) -> Iterable[TensorSlice]:
        """Yield this rank's part of all weights (`model/NAME`) and states (`optimizer/STATE/NAME`).

        Args:
            model: the wrapped model.
            optimizer: its wrapped optimizer, if its states are to be saved.
            names: parameters and buffers to their names in the model's own family; a tied one has one name.
            world: the ranks.
        """

    @abstractmethod
    def import_state(
        self,
        model: ModelWrapper,
        optimizer: OptimizerWrapper | None,
        names: Mapping[torch.Tensor, str],
        checkpoint: Checkpoint,
    ) -> None:
        """Fill weights and states from a checkpoint; the arguments are those of `export_state`."""
