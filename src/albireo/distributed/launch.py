"""Start ranks on this machine, see them through, and end all of them when one fails."""

from __future__ import annotations

import json
import math
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

from albireo.device.cores import usable_cores
from albireo.errors import AlbireoError, Interrupted, LaunchError

__all__ = [
    "RANK_MODULE",
    "describe_end",
    "launch_ranks",
    "loopback_environment",
    "rank_environment",
    "threads_environment",
]

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
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return {**threads_environment(world_size), **loopback_environment(), **base, **numbers}


def threads_environment(ranks: int) -> dict[str, str]:
    """Return the variables that share this machine's cores out.

    Args:
        ranks: how many compute on this machine.
    """
    # One thread a rank would make everything on the host several times slower; all cores for each would too.
    return {"OMP_NUM_THREADS": str(max(1, usable_cores() // ranks))}


def loopback_environment() -> dict[str, str]:
    """Return the variables that have ranks of one machine speak over its loopback interface.

    Nothing of theirs is then to be seen on a network.
    """
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}


def launch_ranks(
    entry: str,
    payload: Mapping[str, Any],
    world_size: int,
    *,
    extra_environment: Mapping[str, str] | None = None,
    timeout_seconds: float = math.inf,
    patience_seconds: float | None = None,
) -> None:
    """Run a function on several new ranks of this machine, and wait for all.

    Args:
        entry: `module:function`; it is called as `function(world, payload)` on each rank.
        payload: JSON values for it.
        world_size: how many ranks.
        extra_environment: variables for the ranks beside those of this process.
        timeout_seconds: when to end them all.
        patience_seconds: how long the ranks' watchdogs take to be sure that one of them hangs; None: its default.

    Raises:
        AlbireoError: what the first rank to fail raised, if it said so.
        LaunchError: a rank ended without saying why, or the time was up.
    """
    with tempfile.TemporaryDirectory(prefix="albireo-ranks-") as name:
        folder = Path(name)
        base = {**os.environ, **(extra_environment or {})}
        task = {"entry": entry, "payload": payload, "patience_seconds": patience_seconds}
        (folder / "payload.json").write_text(json.dumps(task))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", RANK_MODULE, str(folder), str(os.getpid())],
                env=rank_environment(rank, world_size, base),
                stdin=subprocess.DEVNULL,
                # A terminal's Ctrl-C would reach launcher and ranks at once; so it reaches them once, from here.
                start_new_session=True,
            )
            for rank in range(world_size)
        ]
        try:
            with _signals_passed_on(ranks):
                failed = _wait(ranks, timeout_seconds)
        finally:
            _end(ranks)
        if failed is not None:
            raise _reason(folder, failed, ranks[failed].returncode)


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_seconds: float) -> int | None:
    """Return the first rank that failed, or None when all are done."""
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
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
    raise LaunchError(f"the ranks did not end within {timeout_seconds:g} s")


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
    lost = LaunchError(describe_end(rank, code))
    lost.exit_code = 70
    return lost


def describe_end(rank: int, code: int) -> str:
    """Say how a rank ended.

    Args:
        rank: its number.
        code: its exit code; negative: the signal that ended it.
    """
    if code >= 0:
        return f"rank {rank} ended with exit code {code}; its own message is above"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the system does so when host memory runs out" if -code == signal.SIGKILL else ""
    return f"rank {rank} was ended by {name}{hint}"
