"""Scripts of users' own on a GPU, and how two ranks with a GPU each end: NCCL must say nothing and wait for nobody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from albireo import Booster, HybridAdam, launch_from_torch
from albireo.distributed import World
from albireo.distributed.launch import loopback_environment

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_loop_goes_on_to_the_bit(tmp_path: Path, precision: str) -> None:
    device = torch.device("cuda", 0)

    def make(seed: int) -> tuple[Booster, nn.Module, object]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = HybridAdam(model.parameters(), lr=1e-2)  # before the model comes to the GPU
        booster = Booster(mixed_precision=precision, world=World(0, 1, 0, device))
        model, optimizer, *_ = booster.boost(model, optimizer, nn.CrossEntropyLoss())
        return booster, model, optimizer

    def train(made: tuple, steps: range) -> list[torch.Tensor]:
        booster, model, optimizer = made
        for step in steps:
            rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            batch = {"input": rows, "labels": (rows[:, 0] > 0).long()}
            booster.train_step(model, optimizer, batch, max_norm=1.0)
        return [parameter.detach().clone() for parameter in model.parameters()]

    made, other = make(1), make(2)
    train(made, range(3))
    made[0].save_model(made[1], tmp_path / "model.safetensors")
    made[0].save_optimizer(made[2], tmp_path / "optimizer.safetensors")
    other[0].load_model(other[1], tmp_path / "model.safetensors")
    other[0].load_optimizer(other[2], tmp_path / "optimizer.safetensors")
    for ours, theirs in zip(train(other, range(3, 6)), train(made, range(3, 6)), strict=True):
        assert ours.is_cuda
        assert torch.equal(ours, theirs)


def test_alone_a_group_of_one_speaks_for_host_and_device() -> None:
    state = torch.get_rng_state()
    with launch_from_torch(verbose=False) as world:
        for device in ("cpu", world.device):
            tensor = torch.ones(2, device=device)
            torch.distributed.all_reduce(tensor)
            assert tensor.tolist() == [1.0, 1.0]
    torch.set_rng_state(state)


SCRIPT = """
import sys
import torch
from torch import nn
from albireo import Booster, launch
rank, port, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
world = launch(rank, 2, "127.0.0.1", port, verbose=False)
model = nn.Linear(3, 2)
booster = Booster()
model, optimizer, *_ = booster.boost(model, torch.optim.AdamW(model.parameters()))
def step():
    booster.backward(model(torch.ones(1, 3, device=world.device)).sum(), optimizer)
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()
step()
if rank == 1 and how == "raise":
    raise ValueError("rank one is unwell")
if rank == 1 and how == "exit":
    sys.exit(3)
if how != "late":
    step()
if how == "late" and rank == 1:
    import time
    time.sleep(5)
"""


@pytest.mark.parametrize("how", ["end", "late", "raise", "exit"])
def test_ranks_end_without_a_word_and_without_waiting(tmp_path: Path, how: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(rank), str(port), how],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **loopback_environment()},
        )
        for rank in range(2)
    ]
    if how in ("raise", "exit"):
        # What a launcher does once a rank has failed; the other is in a collective for which nobody comes.
        code = ranks[1].wait(timeout=90)
        ranks[0].terminate()
        ranks[0].communicate(timeout=90)
        assert code == (1 if how == "raise" else 3)
        said = ranks[1].communicate()[1]
        assert "ProcessGroupNCCL" not in said, said
    else:
        said = [rank.communicate(timeout=90)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], said
        assert said == ["", ""]
