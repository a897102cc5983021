"""The names that a module's tensors have in its state dict, tied ones once."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["tensor_names"]


def tensor_names(model: nn.Module) -> tuple[dict[torch.Tensor, str], dict[str, str]]:
    """Return a model's tensors with their names, and the further names of tied ones.

    Args:
        model: any module; its persistent buffers count too.

    Returns:
        Tensor to its first name, and further name to first name.
    """
    names: dict[torch.Tensor, str] = {}
    aliases: dict[str, str] = {}
    persistent = set(model.state_dict(keep_vars=True))
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        if name not in persistent:
            continue
        if tensor in names:
            aliases[name] = names[tensor]
        else:
            names[tensor] = name
    return names, aliases
