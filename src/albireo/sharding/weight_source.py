"""Where a model's first weights come from, a range at a time: whoever owns a part of a parameter asks for that part."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from albireo.errors import ConfigError

__all__ = ["ParameterValues", "WeightSource", "WithOwnValues", "check_range"]


class WeightSource(Protocol):
    """The first values of a model's parameters. Any range of any parameter can be had, in any order, again and again.

    A parameter stands for itself, whatever its name has become; one that several modules share is one. Its dtype, its
    device and its memory do not matter, but its size is the one that it had when the source was made.
    """

    def fill(self, parameter: nn.Parameter, start: int, out: torch.Tensor) -> None:
        """Write the elements `[start, start + out.numel())` of a parameter, flattened in row-major order.

        Args:
            parameter: one of the model's.
            start: the first element.
            out: `[n]`, contiguous, of any dtype of floating point, in host memory or on a device.

        Raises:
            ConfigError: the parameter is not the model's, or has no such elements.
            ModelError: the values cannot be read, or nobody knows how the parameter begins.
        """

    def close(self) -> None:
        """Let go of what is held open: files, threads, memory. Nothing can be had after that."""


class ParameterValues:
    """The source for a model that has its weights in memory: they are read where they are.

    A range must be asked for before the parameter is given other memory.
    """

    def fill(self, parameter: nn.Parameter, start: int, out: torch.Tensor) -> None:
        """Copy a range of the parameter; see `WeightSource.fill`.

        Raises:
            ConfigError: the parameter is on the meta device, or has no such elements.
        """
        check_range(parameter.numel(), start, out)
        if parameter.is_meta:
            raise ConfigError(
                "a parameter is on the meta device, and nothing says how it begins: build the model within "
                "albireo.LazyInitContext, or give it memory first"
            )
        out.copy_(parameter.detach().reshape(-1)[start : start + out.numel()])

    def close(self) -> None:
        """Do nothing: nothing is held."""


class WithOwnValues:
    """The source for a model some of whose parameters have memory, such as an adapter's on a model without.

    Args:
        source: of those on the meta device; it is closed with this one.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._own = ParameterValues()

    def fill(self, parameter: nn.Parameter, start: int, out: torch.Tensor) -> None:
        """Copy a range of the parameter, or have the source fill it; see `WeightSource.fill`.

        A range of one in memory must be asked for before it is given other memory.

        Raises:
            ConfigError: the parameter is not the model's, or has no such elements.
            ModelError: the values cannot be read.
        """
        (self._source if parameter.is_meta else self._own).fill(parameter, start, out)

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def check_range(numel: int, start: int, out: torch.Tensor) -> None:
    """Refuse a range that a parameter does not have, or a tensor that cannot take it.

    Args:
        numel: elements of the parameter.
        start: the first element that is asked for.
        out: what is to be filled.

    Raises:
        ConfigError: with both.
    """
    if out.ndim != 1 or not out.is_contiguous() or not 0 <= start <= start + out.numel() <= numel:
        raise ConfigError(
            f"a parameter of {numel} elements cannot fill a tensor of shape {tuple(out.shape)} from element {start} on: "
            "give a contiguous 1-D tensor and a range within"
        )
