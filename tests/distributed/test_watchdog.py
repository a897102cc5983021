"""Ranks that hang are ended, all of them, with a line that names rank, module and collective; others are waited for."""

from __future__ import annotations

import os
import re
import socket
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


class Frozen(nn.Module):
    """Tells where it is, and waits to be let go."""

    def __init__(self, reached: threading.Event, go: threading.Event) -> None:
        super().__init__()
        self.reached, self.go = reached, go

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.reached.set()
        assert self.go.wait(20)
        return inputs


def test_the_main_thread_is_seen_from_outside() -> None:
    reached, go = threading.Event(), threading.Event()
    model = nn.Sequential(nn.ReLU(), nn.ModuleDict({"deep": Frozen(reached, go)})["deep"])
    seen: list[Any] = []

    def watch() -> None:
        assert reached.wait(20)
        seen.extend([look(), look(), look(closely=True)])
        go.set()

    thread = threading.Thread(target=watch)
    thread.start()
    model(torch.zeros(1))
    thread.join()
    first, second, closely = seen
    assert (first.activity, first.module, first.collective) == ("forward", "Sequential > Frozen", "")
    assert (first.in_step, first.excused, first.counts) == (False, False, ())
    assert first == second
    assert closely.module == "1 (Frozen)"


class Board(NoticeBoard):
    """Holds what the others say; loses itself when it is told to."""

    def __init__(self, others: list[VitalSign | None]) -> None:
        self.others = others
        self.posted: list[VitalSign] = []
        self.is_lost = False

    def post(self, text: bytes) -> None:
        self.posted.append(VitalSign.decode(text))
        if self.is_lost:
            raise OSError("the store is gone")

    def read(self) -> list[bytes | None]:
        return [None if sign is None else sign.encode() for sign in self.others]

    def close(self) -> None:
        pass


def watched(board: Board, seconds: float, patience_seconds: float = 0.25) -> list[tuple[str, bool]]:
    """What rank 1 of two says in the end, while its main thread stands in this sleep."""
    ends: list[tuple[str, bool]] = []
    watchdog = Watchdog(
        board, 1, patience_seconds=patience_seconds, end=lambda text, *, speaks: ends.append((text, speaks))
    )
    with watchdog:
        deadline = time.monotonic() + seconds
        while not ends and time.monotonic() < deadline:
            time.sleep(0.1)
    return ends


def test_the_verdict_of_another_rank_is_everybodys() -> None:
    board = Board([replace(own_sign(), beat=1, verdict="rank 0 says so", culprit=0), None])
    assert watched(board, 10) == [("rank 0 says so", True)]  # rank 0 is the one to blame, so rank 1 speaks
    board = Board([replace(own_sign(), beat=1, verdict="rank 1 is bad", culprit=1), None])
    assert watched(board, 10) == [("rank 1 is bad", False)]


def test_nobody_is_judged_while_nobody_waits() -> None:
    gone = replace(own_sign(), beat=1, pid=2**22 - 3, counts=(5,))
    assert watched(Board([gone, None]), 1.0) == []


def test_who_leaves_says_so() -> None:
    board = Board([None, None])
    watched(board, 0.0)
    assert board.posted[-1].ended == "left"
    with pytest.raises(ValueError, match="x"), Watchdog(board, 1, patience_seconds=0.25):
        raise ValueError("x")
    assert board.posted[-1].ended == "failed"


def test_a_store_that_is_gone_is_borne_by_who_does_not_wait() -> None:
    board = Board([None, None])
    board.is_lost = True
    # It sleeps, which is no waiting, again and again.
    assert watched(board, 1.0) == []


def test_files_hold_the_last_word_of_each(tmp_path: Path) -> None:
    boards = [FileBoard(tmp_path, rank, 3) for rank in range(2)]
    assert boards[0].read() == [None, None, None]
    boards[0].post(b"a long word")
    boards[1].post(b"b")
    boards[0].post(b"word")
    assert boards[1].read() == [b"word", b"b", None]
    # What was cut off while it was written is not believed, and the last whole one stays.
    with (tmp_path / "sign-0").open("r+b") as file:
        file.seek(9)
        file.write(b"X")
    assert boards[1].read() == [b"word", b"b", None]
    with pytest.raises(ValueError, match="at most"):
        boards[0].post(b"x" * 5000)
    for board in boards:
        board.close()


def test_a_sign_survives_its_way() -> None:
    sign = replace(own_sign(), counts=(3, 4), collective="all_reduce", module="é", waits_seconds=1.5)
    assert VitalSign.decode(sign.encode()) == sign


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
    assert said.startswith("rank 1 is stopped by a signal, last seen in ")
    assert re.search(r"; rank 0 waits for it in all_gather\w* \(collective \d+\), in \w+ of layers\.1", said)
    assert said.endswith("; all ranks are ended")


def test_who_takes_long_is_waited_for_and_who_differs_is_told(entries: Path) -> None:
    said = launched("take_long_and_then_differ", entries)
    assert {path.name for path in entries.glob("*.waited")} == {"0.waited", "1.waited"}
    assert said.startswith("ranks wait for each other in different collectives: rank 0 in all_reduce (collective ")
    assert "rank 1 in broadcast (collective " in said
    assert "take_long_and_then_differ (watchdog_entries.py:" in said


def test_a_script_of_ones_own_is_watched_too(entries: Path) -> None:
    """Over torch's store: a rank loops within a step, and both end, the line printed once."""
    program = f"""
import sys
sys.path.insert(0, {str(entries)!r})
import albireo.distributed.from_torch as from_torch
from_torch.SCRIPT_STUCK_SECONDS = {PATIENCE_SECONDS}
import watchdog_entries
rank, port = int(sys.argv[1]), int(sys.argv[2])
how = dict(backend="gloo", verbose=False, watchdog_seconds={PATIENCE_SECONDS})
watchdog_entries.loop(from_torch.launch(rank, 2, "127.0.0.1", port, **how), None)
"""
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
    try:
        errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [70, 70]
    lines = [line for text in errors for line in text.splitlines() if line.startswith("albireo: ")]
    assert len(lines) == 1
    assert lines[0].startswith("albireo: rank 1 has not gone on for ")
    assert "in forward of layers.1 (Layer); rank 0 waits for it in " in lines[0]
