"""Ranks that hang are ended, all of them, with a line that names rank, module and collective; others are waited for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from albireo.distributed import launch_ranks
from albireo.distributed.launch import rank_environment
from albireo.distributed.notice_board import FileBoard, NoticeBoard
from albireo.distributed.vital_signs import VitalSign, look, own_sign
from albireo.distributed.watchdog import Watchdog
from albireo.errors import AlbireoError

PATIENCE_SECONDS = 2.0

ENTRIES = """
import os, pathlib, signal, sys, time
import torch
import torch.distributed as dist
from torch import nn
from albireo.booster import Booster
from albireo.distributed import World
from albireo.optim import HybridAdam
from albireo.plugins import LowLevelZeroPlugin, TorchFSDPPlugin


class Layer(nn.Module):
    def __init__(self, misbehave):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.misbehave = misbehave

    def forward(self, inputs):
        self.misbehave()
        return self.inner(inputs)


class Model(nn.Module):
    def __init__(self, misbehave):
        super().__init__()
        self.layers = nn.ModuleList([Layer(lambda: None), Layer(misbehave)])

    def forward(self, inputs):
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs.square().sum(), torch.tensor(len(inputs))


def steps(world, plugin, misbehave, number):
    model = Model(misbehave)
    booster = Booster(plugin=plugin, world=World(world.rank, world.world_size, 0, torch.device("cpu")))
    model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    for _ in range(number):
        booster.train_step(model, optimizer, {"inputs": torch.ones(3, 4)}, 3)
        time.sleep(0.05)


def at_step(world, number, action):
    count = 0

    def misbehave():
        nonlocal count
        count += 1
        if world.rank == 1 and count == number:
            action()

    return misbehave


def stop(world, payload):
    steps(world, TorchFSDPPlugin(), at_step(world, 10, lambda: os.kill(os.getpid(), signal.SIGSTOP)), 1000)


def loop(world, payload):
    def spin():
        while True:
            sum(range(1000))

    # Steps are seen before.
    steps(world, LowLevelZeroPlugin(stage=2, precision="fp32"), at_step(world, 100, spin), 1000)


def take_long_and_then_differ(world, payload):
    # However long something else takes, it is waited for: asleep, or busy, within a model or not.
    deadline = time.monotonic() + 2 * payload["patience"]
    if world.rank == 0:
        time.sleep(2 * payload["patience"])
    world.barrier()
    with torch.no_grad():
        if world.rank == 1:
            Model(lambda: time.sleep(2 * payload["patience"]))(torch.ones(3, 4))
    world.barrier()
    pathlib.Path(payload["folder"], f"{world.rank}.waited").touch()
    if world.rank == 0:
        dist.all_reduce(torch.zeros(5))
    else:
        dist.broadcast(torch.zeros(5), src=0)
"""


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "watchdog_entries.py").write_text(ENTRIES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def launched(entry: str, folder: Path) -> str:
    payload = {"folder": str(folder), "patience": PATIENCE_SECONDS}
    with pytest.raises(AlbireoError) as raised:
        launch_ranks(f"watchdog_entries:{entry}", payload, 2, patience_seconds=PATIENCE_SECONDS, timeout_seconds=120)
    assert raised.value.exit_code == 70
    return str(raised.value)


def test_a_rank_that_is_stopped_ends_all(entries: Path) -> None:
    said = launched("stop", entries)
    print(said)
    assert said.startswith("rank 1 is stopped by a signal, last seen in ")
    assert re.search(r"; rank 0 waits for it in all_gather\w* \(collective \d+\), in \w+ of layers\.1", said)
    assert said.endswith("; all ranks are ended")


def test_who_takes_long_is_waited_for_and_who_differs_is_told(entries: Path) -> None:
    said = launched("take_long_and_then_differ", entries)
    print(said)
    assert {path.name for path in entries.glob("*.waited")} == {"0.waited", "1.waited"}
    assert said.startswith("ranks wait for each other in different collectives: rank 0 in all_reduce (collective ")
    assert "rank 1 in broadcast (collective " in said
    assert "take_long_and_then_differ (watchdog_entries.py:" in said


def test_a_script_of_ones_own_is_watched_too(entries: Path) -> None:
    """Over torch's store: a rank loops within a step, and both end, the line printed once."""
    program = """
import sys
sys.path.insert(0, {folder!r})
import albireo.distributed.from_torch as from_torch
from_torch.SCRIPT_STUCK_SECONDS = {patience}
import watchdog_entries
rank = int(sys.argv[1])
world = from_torch.launch(rank, 2, "127.0.0.1", int(sys.argv[2]), backend="gloo", verbose=False, watchdog_seconds={patience})
watchdog_entries.loop(world, {{}})
""".format(folder=str(entries), patience=PATIENCE_SECONDS)
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(port)],
            env=rank_environment(rank, 2, os.environ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    print(errors)
    assert [rank.returncode for rank in ranks] == [70, 70]
    lines = [line for text in errors for line in text.splitlines() if line.startswith("albireo: ")]
    assert len(lines) == 1
    assert lines[0].startswith("albireo: rank 1 has not gone on for ")
    assert "in forward of layers.1 (Layer); rank 0 waits for it in " in lines[0]
