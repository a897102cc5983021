"""Start ranks on this machine, see them through, and end all of them when one fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from albireo.errors import AlbireoError, Interrupted, LaunchError

__all__ = ["RANK_MODULE", "launch_ranks", "rank_environment"]

RANK_MODULE = "albireo.distributed.rank"

# Ranks that fail together each need a moment to say why before the first one's failure ends them all.
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05


def rank_environment(rank: int, world_size: int, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of one of several ranks on this machine.

    Args:
        rank: its number.
        world_size: how many there are.
        base: the launcher's own environment; what it sets on purpose is kept.
    """
    environment = dict(base)
    environment.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    # One thread a rank would make everything on the host several times slower; all cores for each would too.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // world_size)))
    # Ranks of one machine meet on the loopback interface: nothing of theirs is to be seen on a network.
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    environment.setdefault("NCCL_SOCKET_IFNAME", loopback)
    return environment


def launch_ranks(entry: str, payload: Mapping[str, Any], world_size: int) -> None:
    """Run a function on several new ranks of this machine, and wait for all.

    Args:
        entry: `module:function`; it is called as `function(world, payload)` on each rank.
        payload: JSON values for it.
        world_size: how many ranks.

    Raises:
        AlbireoError: what the first rank to fail raised, if it said so.
        LaunchError: a rank ended without saying why.
    """
    with tempfile.TemporaryDirectory(prefix="albireo-ranks-") as name:
        folder = Path(name)
        (folder / "payload.json").write_text(json.dumps({"entry": entry, "payload": payload}))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", RANK_MODULE, str(folder), str(os.getpid())],
                env=rank_environment(rank, world_size, os.environ),
                stdin=subprocess.DEVNULL,
                # A terminal's Ctrl-C would reach launcher and ranks at once; so it reaches them once, from here.
                start_new_session=True,
            )
            for rank in range(world_size)
        ]
        try:
            with _signals_passed_on(ranks):
                failed = _wait(ranks)
        finally:
            _end(ranks)
        if failed is not None:
            raise _reason(folder, failed, ranks[failed].returncode)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """Return the first rank that failed, or None when all are done."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((rank for rank, code in enumerate(codes) if code not in (None, 0)), None)
        if failed is not None:
            deadline = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
                time.sleep(_POLL_SECONDS)
            return failed
        if all(code == 0 for code in codes):
            return None
        time.sleep(_POLL_SECONDS)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    for rank in ranks:
        rank.wait()


@contextmanager
def _signals_passed_on(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, _frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(folder: Path, rank: int, code: int) -> AlbireoError:
    said = folder / f"error-{rank}.json"
    if said.exists():
        report = json.loads(said.read_text())
        error = Interrupted(report["message"]) if report["exit_code"] == 130 else AlbireoError(report["message"])
        error.exit_code = report["exit_code"]
        return error
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the system does so when host memory runs out" if -code == signal.SIGKILL else ""
        error = LaunchError(f"rank {rank} was ended by {name}{hint}")
    else:
        error = LaunchError(f"rank {rank} ended with exit code {code}; its own message is above")
    error.exit_code = 70
    return error
