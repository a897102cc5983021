"""The steps of own_loop.py by hand: backward, accumulation, clipping and evaluation are yours; fp16 or bf16 is a word.

python examples/own_loop_by_hand.py
albireo run --nproc-per-node 2 examples/own_loop_by_hand.py
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from albireo import Booster, DistCoordinator, HybridAdam, TorchDDPPlugin, launch_from_torch

ACCUMULATE = 2

with launch_from_torch(seed=1):
    coordinator = DistCoordinator()
    plugin = TorchDDPPlugin()
    booster = Booster(mixed_precision="bf16", plugin=plugin)

    points = torch.rand(512, 2) * 2 - 1
    dataset = torch.utils.data.TensorDataset(points, (points.norm(dim=1) < 0.8).long())
    loader = plugin.prepare_dataloader(dataset, batch_size=32 // coordinator.world_size, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 2))
    optimizer = HybridAdam(model.parameters(), lr=1e-2)
    model, optimizer, criterion, loader, _ = booster.boost(model, optimizer, F.cross_entropy, loader)

    for _ in range(20):
        for number, (inputs, labels) in enumerate(loader):
            last = number % ACCUMULATE == ACCUMULATE - 1
            with nullcontext() if last else booster.no_sync(model):
                outputs = model(inputs.to(booster.world.device))
                loss = criterion(outputs, labels.to(booster.world.device))
                booster.backward(loss / ACCUMULATE, optimizer)
            if last:
                optimizer.clip_grad_by_norm(1.0)
                optimizer.step()
                optimizer.zero_grad()

    model.eval()
    with torch.no_grad():
        inside = model(points.to(booster.world.device)).argmax(1).cpu()
    coordinator.print_on_master(f"right: {(inside == dataset.tensors[1]).float().mean():.0%}")
    booster.save_model(model, "circle/by_hand.safetensors")
