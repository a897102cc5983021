"""An adapter added to the weights that it stands beside."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from albireo.adapters.lora import has_lora
from albireo.adapters.names import adapter_part, own_name, own_names
from albireo.adapters.quantised import QuantisedLinear

__all__ = ["merge_in_place", "merged_weights"]


def merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's weights by the family's own names, each adapter's product added to its matrix.

    Args:
        model: with adapters, in host memory; it is not changed.

    Returns:
        New tensors where there is an adapter or a quantised layer, the model's own elsewhere; tied ones under each of their names.
    """
    names, aliases = own_names(model)
    weights = {name: tensor.detach() for tensor, name in names.items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            place = own_name(f"{name}.codes").removesuffix("codes")
            del weights[f"{place}codes"], weights[f"{place}scales"]
            weights[f"{place}weight"] = module.dequantised_weight()
    for name, module in model.named_modules() if has_lora(model) else ():
        if _is_lora(module):
            place = f"{name}.weight"
            layer: Any = module  # each kind of layer has its own method of this name
            delta = layer.get_delta_weight("default")
            weights[place] = weights[place] + delta.detach().to(weights[place].dtype)
    for name in adapter_part(weights):
        del weights[name]
    weights.update({name: weights[first] for name, first in aliases.items()})
    return weights


def merge_in_place(model: nn.Module) -> None:
    """Add each adapter's product to its matrix, for a model that is used and no longer trained. Without adapters: nothing.

    A quantised layer under an adapter is dequantised first.

    Args:
        model: with adapters or without.
    """
    for module in list(model.modules()) if has_lora(model) else ():
        if _is_lora(module):
            layer: Any = module
            if isinstance(layer.base_layer, QuantisedLinear):
                layer.base_layer = layer.base_layer.dequantised()
            layer.merge()


def _is_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)
