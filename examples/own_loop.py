"""A model, a data set and a loop of your own, on any number of ranks.

python examples/own_loop.py
albireo run --nproc-per-node 2 examples/own_loop.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from albireo import Booster, DistCoordinator, HybridAdam, TorchDDPPlugin, launch_from_torch


class Circle(nn.Module):
    """Is a point of the plane inside the circle?"""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 2))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.layers(points)


with launch_from_torch(seed=1):
    coordinator = DistCoordinator()
    plugin = TorchDDPPlugin()
    booster = Booster(plugin=plugin)

    samples = [{"points": point, "labels": (point.norm() < 0.8).long()} for point in torch.rand(512, 2) * 2 - 1]
    loader = plugin.prepare_dataloader(samples, batch_size=64 // coordinator.world_size, shuffle=True)
    model = Circle()
    optimizer = HybridAdam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20 * len(loader))
    model, optimizer, criterion, loader, schedule = booster.boost(model, optimizer, F.cross_entropy, loader, schedule)

    for epoch in range(20):
        for batch in loader:
            output = booster.train_step(model, optimizer, batch, lr_scheduler=schedule, max_norm=1.0)
        if epoch % 5 == 4:
            coordinator.print_on_master(f"epoch {epoch + 1}: loss {output.loss.item():.3f}")

    booster.save_model(model, "circle/model.safetensors")
