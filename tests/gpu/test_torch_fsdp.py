"""FSDP2 on a GPU: what it computes there is what the plain plugin computes, and what is offloaded lies on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from albireo.booster import Booster
from albireo.distributed import process_group
from albireo.distributed.world import current_world
from albireo.optim import HybridAdam, OptimizerWrapper
from albireo.plugins import ModelWrapper, Plugin, TorchDDPPlugin, TorchFSDPPlugin

pytestmark = pytest.mark.gpu


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU()) for _ in range(3)])
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        # The tokens after: an embedding that is tied to the head tells the tokens themselves without learning.
        logits, following = self.head(hidden).float().flatten(0, 1), ids.roll(-1, 1).flatten()
        loss = nn.functional.cross_entropy(logits, following, reduction="sum")
        return loss, torch.tensor(ids.numel(), device=ids.device)


def train(plugin: Plugin, steps: int = 6) -> tuple[list[list[float]], ModelWrapper, OptimizerWrapper]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Blocks()
    booster = Booster(plugin=plugin)
    wrapped, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=1e-3))
    numbers = []
    for step in range(steps):
        ids = torch.randint(0, 100, (2, 8, 16), generator=torch.Generator().manual_seed(step))
        output = booster.train_step(wrapped, optimizer, [{"ids": part} for part in ids], [128, 128], max_norm=1.0)
        numbers.append([output.loss_sum.item() / 256, output.grad_norm.item()])
    return numbers, wrapped, optimizer


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05), ("fp16", 0.02)])
def test_it_trains_as_the_plain_plugin_does(precision: str, tolerance: float, cpu_offload: bool) -> None:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        wanted, *_ = train(TorchDDPPlugin())
        with process_group(current_world()):
            got, model, optimizer = train(TorchFSDPPlugin(precision=precision, cpu_offload=cpu_offload))
            kept: list[Any] = [p.device.type for group in optimizer.param_groups for p in group["params"]]
            kept += [state["exp_avg"].device.type for state in optimizer.unwrap().state.values()]
            assert set(kept) == {"cpu" if cpu_offload else "cuda"}
            assert {p.device.type for p in model.unwrap().parameters()} == {"cpu" if cpu_offload else "cuda"}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    assert torch.allclose(torch.tensor(got), torch.tensor(wanted), rtol=tolerance)
