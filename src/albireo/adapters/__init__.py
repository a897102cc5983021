"""Adapters: a few trained weights beside a model whose own are frozen, by peft.

`lora` puts them on a model, `names` tells what its tensors are called in the family's own names, `files` writes and reads
an adapter's folder as peft does, `quantised` puts frozen layers into 8 or 4 bits, `merge` adds an adapter to the weights it stands beside.
"""

from __future__ import annotations

from albireo.adapters.files import ADAPTER_FILE, load_adapter, save_adapter
from albireo.adapters.layers import adaptable
from albireo.adapters.lora import (
    LoraPlan,
    attach_lora,
    check_targets,
    count_lora,
    has_lora,
    lora_config_in,
    lora_config_of,
    require_peft,
)
from albireo.adapters.merge import merge_in_place, merged_weights
from albireo.adapters.names import own_name, own_names
from albireo.adapters.quantised import (
    QuantisedLayer,
    QuantisedLinear,
    attach_adapter,
    count_weights,
    quantise_base,
    quantise_weight,
)

__all__ = [
    "ADAPTER_FILE",
    "LoraPlan",
    "QuantisedLayer",
    "QuantisedLinear",
    "adaptable",
    "attach_adapter",
    "attach_lora",
    "check_targets",
    "count_lora",
    "count_weights",
    "has_lora",
    "load_adapter",
    "lora_config_in",
    "lora_config_of",
    "merge_in_place",
    "merged_weights",
    "own_name",
    "own_names",
    "quantise_base",
    "quantise_weight",
    "require_peft",
    "save_adapter",
]
