"""Ragged steps over a branch that only some batches take, as the tests of sharded plugins train them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from albireo.booster import Booster
from albireo.optim import HybridAdam, OptimizerWrapper
from albireo.plugins import ModelWrapper


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "lr": 5e-3},
    ]


def optimizer_of(model: nn.Module, kind: str = "HybridAdam") -> torch.optim.Optimizer:
    if kind == "HybridAdam":
        return HybridAdam(groups(model), lr=1e-2)
    if kind == "SGD":
        return torch.optim.SGD(groups(model), lr=1e-2, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups(model), lr=1e-2, foreach=True, amsgrad=True)


def batches_of(step: int, rank: int, accumulate: int) -> list[dict[str, Any]]:
    """Ragged counts; the branch is taken on odd steps, and there on rank 0 alone."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    batches = []
    for number in range(accumulate):
        ids = torch.randint(0, 37, (2, 6), generator=generator)
        labels = ids.clone()
        labels[0, : (step + rank + number) % 5] = -100
        batches.append({"ids": ids, "labels": labels, "branch": step % 2 == 1 and rank == 0})
    return batches


def tokens_of(batches: list[dict[str, Any]]) -> list[int]:
    return [int((batch["labels"] >= 0).sum()) for batch in batches]


def train(
    booster: Booster, model: ModelWrapper, optimizer: OptimizerWrapper, steps: range, accumulate: int, clip: float
) -> list[list[float]]:
    numbers = []
    for step in steps:
        batches = batches_of(step, booster.world.rank, accumulate)
        output = booster.train_step(model, optimizer, batches, tokens_of(batches), max_norm=clip)
        total = booster.world.sum_in_place(torch.tensor([float(output.loss_sum), float(output.tokens)]))
        numbers.append([float(total[0] / total[1]), float(output.grad_norm)])
    return numbers
