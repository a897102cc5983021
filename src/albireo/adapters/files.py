"""An adapter's folder, as `peft.PeftModel.from_pretrained` opens it: safetensors and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from albireo.adapters.lora import lora_config_in
from albireo.adapters.names import adapter_part, own_names, peft_name
from albireo.errors import ModelError

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["ADAPTER_FILE", "load_adapter", "save_adapter"]

ADAPTER_FILE = "adapter_model.safetensors"


def save_adapter(weights: Mapping[str, torch.Tensor], config: LoraConfig, folder: Path, *, base: str | None) -> None:
    """Write an adapter.

    Args:
        weights: of the whole model or of the adapter alone, by `own_name`.
        config: peft's description of it.
        folder: which exists.
        base: what it stands beside: a hub id or a folder; None if that is none that others could load.
    """
    heads = config.modules_to_save or ()
    tensors = {peft_name(name): tensor.contiguous() for name, tensor in adapter_part(weights, heads).items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    before = config.base_model_name_or_path, config.inference_mode
    # As peft writes it: whoever loads it does not train unless he says so.
    config.base_model_name_or_path, config.inference_mode = base, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.base_model_name_or_path, config.inference_mode = before


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Fill a model's adapter from a folder.

    Args:
        model: with an adapter of the same shape on it.
        folder: an adapter's.

    Raises:
        ModelError: the file is missing or damaged, or another adapter's.
    """
    path = folder / ADAPTER_FILE
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    names, _ = own_names(model)
    heads = lora_config_in(model).modules_to_save or ()
    wanted = {peft_name(name): tensor for name, tensor in adapter_part({n: t for t, n in names.items()}, heads).items()}
    for name in sorted({*found, *wanted}):
        if name not in found or name not in wanted or found[name].shape != wanted[name].shape:
            raise ModelError(f"{path} is another adapter's: {name} is missing, too much, or of another shape")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
