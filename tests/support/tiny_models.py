"""Small models that tests share: the same weights for the same seed, whatever the process has drawn before."""

from __future__ import annotations

from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM


def small_opt(*, seed: int = 3, shaken: float = 0.0, **options: Any) -> OPTForCausalLM:
    """Return a small OPT in training mode, without dropout.

    Args:
        seed: which weights.
        shaken: standard deviation of what is added to all parameters, so that biases and norms are not at 0 and 1.
        options: of its configuration, where they are to be others.
    """
    width = options.get("hidden_size", 16)
    defaults = {
        "vocab_size": 41,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "max_position_embeddings": 12,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": 0.1,
    }
    config = OPTConfig(**{**defaults, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OPTForCausalLM(config)
        if shaken:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * shaken)
    return model.train()
