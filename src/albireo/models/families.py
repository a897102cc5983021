"""The families there are, by the name that `config.json` calls them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from albireo.errors import ModelError
from albireo.models.family import Family
from albireo.models.gpt2 import GPT2
from albireo.models.opt import OPT
from albireo.models.vit import VIT

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["FAMILIES", "count_parameters", "family_of"]

FAMILIES: Mapping[str, Family] = MappingProxyType({OPT.name: OPT, GPT2.name: GPT2, VIT.name: VIT})


def family_of(model_type: str) -> Family:
    """Return the family of a `model_type`.

    Raises:
        ModelError: it is not supported; the message names those that are.
    """
    if model_type not in FAMILIES:
        raise ModelError(f"models of type {model_type!r} are not supported: expected one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def count_parameters(config: PreTrainedConfig) -> int:
    """Return the exact number of a model's parameters, tied ones once. Takes no memory for them.

    Args:
        config: a configuration of a supported family.
    """
    return family_of(config.model_type).count_parameters(config)
