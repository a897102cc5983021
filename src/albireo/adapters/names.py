"""What the tensors of a model with adapters are called in its family's own names. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from albireo.checkpoint import tensor_names

__all__ = ["own_name", "own_names", "peft_name"]

_PREFIX = "base_model.model."


def own_name(name: str) -> str:
    """Return a tensor's name without what peft has put into it: the frozen weight's is the family's own again.

    Args:
        name: in a model that adapters were put on, such as `h.0.attn.c_attn.base_layer.weight`, or any other.
    """
    return (
        name.replace(".base_layer.", ".")
        .replace(".lora_A.default.", ".lora_A.")
        .replace(".lora_B.default.", ".lora_B.")
    )


def own_names(model: nn.Module) -> tuple[dict[torch.Tensor, str], dict[str, str]]:
    """Return a model's tensors with their names, and the further names of tied ones; see `tensor_names`.

    Args:
        model: with adapters or without.
    """
    names, aliases = tensor_names(model)
    return (
        {tensor: own_name(name) for tensor, name in names.items()},
        {own_name(name): own_name(first) for name, first in aliases.items()},
    )


def peft_name(name: str) -> str:
    """Return what peft's files call an adapter's tensor.

    Args:
        name: as `own_name` gives it.
    """
    return _PREFIX + name


def adapter_part(weights: Mapping[str, torch.Tensor], heads: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors alone.

    Args:
        weights: of a whole model, by `own_name`.
        heads: layers that were trained as they are, and belong to it.
    """
    return {
        name: tensor
        for name, tensor in weights.items()
        if ".lora_A." in name or ".lora_B." in name or name.rpartition(".")[0] in heads
    }
