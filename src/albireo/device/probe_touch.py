"""How much memory the host gives when pages are really touched.

MemTotal can read too much (a container's limit is lower) and too little (some virtual machines get memory as they use
it). Only touching pages settles it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from albireo.device import probe_touch_child
from albireo.device.probe_memory import HostMemoryReading, probe_host_memory

__all__ = ["TouchReport", "reason_to_stop", "touch_pages"]

# What stays untouched, so that neither this machine nor others in the group are pushed out of memory.
_RESERVE_BYTES = 2**30
_RESERVE_SHARE = 0.05
_STEP_BYTES = 128 * 2**20
# Memory of a machine that grows comes a moment after it is asked for.
_GROWTH_SECONDS = 3.0
_SWAP_BYTES = 64 * 2**20
_STALL_SHARE = 0.5


@dataclass(frozen=True)
class TouchReport:
    """What came of touching pages.

    Attributes:
        asked_bytes: how much was to be touched.
        touched_bytes: how much was, at once.
        seconds: how long it took.
        ended: "all" was touched; it was "stopped" early; the system "refused" to give or "killed" the process that touched.
        why: the reason, if not all.
        total_before_bytes: MemTotal before.
        total_after_bytes: MemTotal with the pages touched.
    """

    asked_bytes: int
    touched_bytes: int
    seconds: float
    ended: str
    why: str
    total_before_bytes: int | None
    total_after_bytes: int | None


def reason_to_stop(
    first: HostMemoryReading, before: HostMemoryReading, now: HostMemoryReading, step_bytes: int, seconds: float
) -> str | None:
    """Decide whether touching one step more could harm anybody else.

    Args:
        first: the reading before anything was touched.
        before: the reading before the last step.
        now: the reading after it.
        step_bytes: the size of a step.
        seconds: from `before` to `now`.

    Returns:
        Why to stop, or None to go on.
    """
    if now.cgroup_limit_bytes is not None and now.cgroup_used_bytes is not None:
        left = now.cgroup_limit_bytes - now.cgroup_used_bytes
        # Beyond its limit a group may be ended as a whole, with this process in it.
        if left < step_bytes + _reserve(now.cgroup_limit_bytes):
            return f"the cgroup's limit is near: {_gb(left)} left of {_gb(now.cgroup_limit_bytes)}"
    if now.swap_used_bytes is not None and first.swap_used_bytes is not None:
        swapped = now.swap_used_bytes - first.swap_used_bytes
        if swapped > _SWAP_BYTES:
            return f"the system began to swap: {_gb(swapped)}"
    if now.stalled_seconds is not None and before.stalled_seconds is not None:
        stalled = now.stalled_seconds - before.stalled_seconds
        if stalled > max(0.2, _STALL_SHARE * seconds):
            return f"everything stood still for {stalled:.1f} s, waiting for memory"
    if now.available_bytes is None or now.total_bytes is None:
        return None
    if now.available_bytes < step_bytes + _reserve(now.total_bytes):
        return f"MemAvailable is down to {_gb(now.available_bytes)}, and MemTotal does not grow"
    return None


def touch_pages(
    asked_bytes: int,
    *,
    step_bytes: int = _STEP_BYTES,
    read: Callable[[], HostMemoryReading] = probe_host_memory,
    watch: Callable[[int], None] = lambda _: None,
) -> TouchReport:
    """Really touch pages of memory, in a process of its own that gives all back by ending.

    That process offers itself to the system as the first to be ended should memory run out: to be killed is an answer.
    Touching stops before that where the readings say that others would be harmed.

    Args:
        asked_bytes: how far to go; whole steps are touched.
        step_bytes: how much at a time.
        read: reads the memory; another one in tests.
        watch: called with the bytes touched so far after each step.
    """
    start = time.monotonic()
    first = now = read()
    touched = 0
    ended, why = "all", ""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", probe_touch_child.__file__, str(step_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        while touched < asked_bytes:
            moment, before = time.monotonic(), now
            answer = _one_step(child)
            if answer != b"touched\n":
                ended, why = _how_it_ended(child, answer)
                break
            touched += step_bytes
            watch(touched)
            now = read()
            reason = reason_to_stop(first, before, now, step_bytes, time.monotonic() - moment)
            if reason is not None and touched < asked_bytes:
                now = _wait_for_growth(now, read)
                reason = reason_to_stop(first, before, now, step_bytes, time.monotonic() - moment)
                if reason is not None:
                    ended, why = "stopped", reason
                    break
    finally:
        child.kill()
        child.communicate()
    seconds = time.monotonic() - start
    return TouchReport(asked_bytes, touched, seconds, ended, why, first.total_bytes, now.total_bytes)


def _one_step(child: subprocess.Popen[bytes]) -> bytes:
    """Have one step touched; returns what the child says, nothing if it is gone."""
    if child.stdin is None or child.stdout is None:
        return b""
    try:
        child.stdin.write(b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        return b""
    return child.stdout.readline()


def _how_it_ended(child: subprocess.Popen[bytes], answer: bytes) -> tuple[str, str]:
    if answer:
        return "refused", f"the system gives no more: {answer.decode(errors='replace').strip()}"
    code = child.wait()
    return "killed", f"the system ended the process that touched (exit code {code})"


def _wait_for_growth(now: HostMemoryReading, read: Callable[[], HostMemoryReading]) -> HostMemoryReading:
    """Give a machine whose memory grows the time to; returns the last reading."""
    deadline = time.monotonic() + _GROWTH_SECONDS
    later = now
    while later.total_bytes == now.total_bytes and time.monotonic() < deadline:
        time.sleep(0.05)
        later = read()
    return later


def _reserve(whole_bytes: int) -> int:
    return min(_RESERVE_BYTES, int(_RESERVE_SHARE * whole_bytes))


def _gb(count: int) -> str:
    return f"{count / 2**30:.1f} GB"
