"""Small models with adapters on them."""

from __future__ import annotations

from typing import Any

import torch

from albireo.adapters import LoraPlan
from albireo.models import GPT2, initialise, materialise

IDS = torch.tensor([[3, 5, 7, 11, 13]])


def small_gpt2(seed: int = 0) -> Any:
    config = GPT2.config_for("tiny", vocab_size=64)
    config.update({"n_embd": 16, "n_positions": 16})
    model = GPT2.make_model(config)
    materialise(model, torch.device("cpu"))
    initialise(model, seed)
    return model


def plan_of(*targets: str, **options: Any) -> LoraPlan:
    return LoraPlan(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": targets or ("c_attn",), **options})


def adapter_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Give B values, as after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapter_of(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
