"""Joining from a script: alone in this process; two ranks, and how they end, in processes of their own."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from albireo import Booster, launch, launch_from_torch
from albireo.distributed import DistCoordinator, World, current_world
from albireo.distributed.launch import loopback_environment
from albireo.errors import ConfigError, LaunchError


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def same_random_state() -> Any:
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    yield
    torch.set_rng_state(state)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


def drawn() -> list[float]:
    return [torch.rand(1).item(), random.random(), float(np.random.rand())]  # noqa: NPY002


def test_alone_there_is_a_world_of_one_with_a_group(capfd: pytest.CaptureFixture[str]) -> None:
    with launch_from_torch() as world:
        assert (world.rank, world.world_size, world.local_rank) == (0, 1, 0)
        assert dist.get_world_size() == 1
        tensor = torch.ones(2)
        dist.all_reduce(tensor)
        assert tensor.tolist() == [1.0, 1.0]
        assert isinstance(world, World)
        assert current_world().world_size == 1
        with pytest.raises(LaunchError, match="has joined its ranks already"):
            launch_from_torch()
    assert not dist.is_initialized()
    said = capfd.readouterr().err
    assert said.startswith("joined 1 rank over ")
    assert "seed 1024" in said
    if not torch.cuda.is_available():
        assert "nccl needs a GPU" in said


def test_the_seed_is_set_everywhere() -> None:
    numbers = []
    for seed in (5, 5, 6):
        with launch_from_torch(seed=seed, verbose=False):
            numbers.append(drawn())
    assert numbers[0] == numbers[1]
    assert all(one != other for one, other in zip(numbers[0], numbers[2], strict=True))


def test_calls_of_older_scripts(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, options in (((), {"config": {}}), (({},), {}), (("gloo", 3, False), {}), (("gloo",), {"seed": 3})):
        with launch_from_torch(*arguments, **options) as world:
            assert world.world_size == 1
    assert capfd.readouterr().err.count("joined") == 3
    with pytest.raises(ConfigError, match="give the backend by its name: backend='gloo'"):
        launch_from_torch({}, "gloo")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="backend is one of nccl, gloo, not 'mpi'"):
        launch_from_torch("mpi")


def test_launch_needs_no_environment() -> None:
    with launch(rank=0, world_size=1, host="127.0.0.1", port=0, verbose=False, config={}) as world:
        assert world.world_size == 1
    with pytest.raises(LaunchError, match="rank 2 does not lie below the world size 2"):
        launch(2, 2, "127.0.0.1", 1)


def test_an_impossible_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(LaunchError, match="must be whole numbers"):
        launch_from_torch()
    assert not dist.is_initialized()


SCRIPT = """
import json, sys, time
rank, port, folder, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
import torch
from torch import nn
from albireo import Booster, DistCoordinator, launch
world = launch(rank, 2, "127.0.0.1", port, seed=7)
coordinator = DistCoordinator()
model = nn.Linear(3, 2)
drawn = [world.rank, coordinator.world_size, model.weight.sum().item()]
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(drawn, file)
booster = Booster()
model, optimizer, *_ = booster.boost(model, torch.optim.AdamW(model.parameters()))

def step():
    booster.backward(model(torch.ones(1, 3)).sum(), optimizer)
    optimizer.step()
    optimizer.zero_grad()

step()
if how == "fail" and rank == 1:
    raise ValueError("rank one is unwell")
step()
coordinator.block_all()
if how == "ok" and rank == 1:
    time.sleep(0.3)  # the rank at whose address all meet is gone by then
"""


def run_two(tmp_path: Path, how: str) -> list[tuple[int, str]]:
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **loopback_environment(), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(rank), str(port), str(tmp_path), how],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    return [(rank.wait(timeout=120), rank.communicate()[1]) for rank in ranks]


def test_a_script_ends_well_without_a_with_block(tmp_path: Path) -> None:
    (first_code, first_said), (second_code, second_said) = run_two(tmp_path, "ok")
    assert (first_code, second_code) == (0, 0), first_said + second_said
    # One line of the main rank, and not a word of gloo or torch.
    assert first_said.splitlines() == ["joined 2 ranks over gloo, seed 7; nccl needs a GPU, and there is none here"]
    assert second_said == ""
    facts = [(tmp_path / f"{rank}.json").read_text() for rank in range(2)]
    assert facts[0].replace("[0,", "[1,") == facts[1]


def test_a_rank_that_fails_is_waited_for_by_nobody(tmp_path: Path) -> None:
    (first_code, _), (second_code, second_said) = run_two(tmp_path, "fail")
    assert (first_code, second_code) == (1, 1)
    assert second_said.rstrip().endswith("ValueError: rank one is unwell")


def test_a_rank_that_has_not_joined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for build in (DistCoordinator, Booster):
        with pytest.raises(LaunchError, match=r"2 ranks were started, .* call launch_from_torch\(\) first"):
            build()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Booster().world.world_size == 1


def test_a_group_without_gloo_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(LaunchError, match=r"join by albireo.launch_from_torch\(\)"):
        DistCoordinator()
    monkeypatch.undo()
