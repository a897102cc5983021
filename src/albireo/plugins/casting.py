"""Modules and criteria around a 16-bit copy of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import nn

__all__ = ["CastInputs", "CriterionInFp32", "bytes_of", "compute_dtypes"]


def compute_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, torch.dtype]:
    """Return in what each parameter of floating point computes, in a 16-bit copy of a model.

    A norm over batches keeps running means, which 16 bits could not add up; its kernels take 16-bit inputs, but want
    weights of the means' dtype.

    Args:
        model: the model.
        dtype: a 16-bit one, or fp32.
    """
    wide = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)  # noqa: SLF001  what all of them are
        and module.running_mean is not None
        for parameter in module.parameters(recurse=False)
    }
    return {p: torch.float32 if p in wide else dtype for p in model.parameters() if p.is_floating_point()}


def bytes_of(model: nn.Module) -> dict[nn.Parameter, torch.dtype]:
    """Return a model's frozen parameters of bytes, such as the codes of a quantised base: they are moved, never cast.

    Args:
        model: the model.
    """
    return {p: p.dtype for p in model.parameters() if p.dtype == torch.uint8 and not p.requires_grad}


class CastInputs(nn.Module):
    """Calls a module with inputs of floating point in its own dtype.

    Args:
        module: what computes in `dtype`.
        dtype: a 16-bit one.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*_cast(args, self._dtype), **_cast(kwargs, self._dtype))


class CriterionInFp32(nn.Module):
    """Calls a criterion with what is of floating point in fp32, so that a loss keeps its bits.

    Args:
        criterion: computes a loss from outputs and labels.
    """

    def __init__(self, criterion: Callable[..., Any]) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the criterion."""
        return self.criterion(*_cast(args, torch.float32), **_cast(kwargs, torch.float32))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast tensors in what functions take and return; what else there is passes through."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(item, dtype) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, MutableMapping):
        # Such as the outputs of a transformers model, which are also attributes of the same names.
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = _cast(item, dtype)
        return copied
    return value
