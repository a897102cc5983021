"""How long a step of a small model takes on the host: blocks of no size, on one thread, with and without checkpointing.

    python benchmarks/host_time.py

On a GPU such a model is bound by this: kernels end sooner than the next ones are launched.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import ViTConfig, ViTForImageClassification

from albireo.models import VIT, enable_activation_checkpointing

_BLOCKS, _ROUNDS, _STEPS = 12, 15, 2


def _model() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=_BLOCKS, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config).train()


def _ours(model: ViTForImageClassification) -> None:
    enable_activation_checkpointing(model, preserve_rng_state=False, family=VIT)


def _torchs(model: ViTForImageClassification) -> None:
    enable_activation_checkpointing(model, preserve_rng_state=False)


def _reentrant(model: ViTForImageClassification) -> None:
    options = {"use_reentrant": True, "preserve_rng_state": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def main() -> None:
    """Measure forward and backward in turn, and print the fastest and the median."""
    torch.set_num_threads(1)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    ways: dict[str, Callable[[ViTForImageClassification], None]] = {
        "no checkpointing": lambda _: None, "torch's, as its users have it": _torchs, "torch's, reentrant": _reentrant,
        "ours (the last block keeps all)": _ours,
    }  # fmt: skip
    models = {name: _model() for name in ways}
    for name, change in ways.items():
        change(models[name])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(_ROUNDS + 1):
        for name, model in models.items():
            began = time.perf_counter()
            for _ in range(_STEPS):
                model(**batch).loss.backward()
                model.zero_grad()
            if turn > 0:
                seconds[name].append((time.perf_counter() - began) / _STEPS)
    for name, values in seconds.items():
        print(f"{name:32} {min(values) * 1e3:6.1f} ms, median {sorted(values)[len(values) // 2] * 1e3:6.1f}")


if __name__ == "__main__":
    main()
