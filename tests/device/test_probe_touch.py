import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.device.probe_memory import HostMemoryReading
from albireo.device.probe_touch import reason_to_stop, touch_pages

MB, GB = 2**20, 2**30
STEP = 8 * MB
CALM = HostMemoryReading(
    usable_bytes=8 * GB,
    limited_by="machine",
    total_bytes=8 * GB,
    available_bytes=6 * GB,
    cgroup_limit_bytes=None,
    cgroup_used_bytes=None,
    swap_used_bytes=0,
    stalled_seconds=0.0,
)


def children() -> list[int]:
    return [int(word) for word in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def test_pages_are_really_there_and_given_back() -> None:
    before = children()
    resident = []

    def look(_: int) -> None:
        (child,) = set(children()) - set(before)
        resident.append(int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))
        assert Path(f"/proc/{child}/oom_score_adj").read_text().strip() == "1000"

    report = touch_pages(5 * STEP, step_bytes=STEP, read=lambda: CALM, watch=look)
    assert (report.touched_bytes, report.ended, report.why) == (5 * STEP, "all", "")
    assert all(bytes_there >= (number + 1) * STEP for number, bytes_there in enumerate(resident))
    assert children() == before


def test_a_process_that_is_killed_is_an_answer() -> None:
    before = children()

    def kill(touched: int) -> None:
        if touched == 3 * STEP:
            (child,) = set(children()) - set(before)
            os.kill(child, signal.SIGKILL)

    report = touch_pages(100 * STEP, step_bytes=STEP, read=lambda: CALM, watch=kill)
    assert report.ended == "killed"
    assert report.touched_bytes == 3 * STEP


def test_it_stops_where_a_reading_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albireo.device.probe_touch._GROWTH_SECONDS", 0.1)
    report = touch_pages(100 * STEP, step_bytes=STEP, read=shrinking(by=GB))
    assert report.ended == "stopped"
    assert report.touched_bytes == 6 * STEP
    assert "MemAvailable is down to" in report.why


def test_it_goes_on_where_the_machine_grows() -> None:
    shrink = shrinking(by=GB)
    count = 0

    def read() -> HostMemoryReading:
        # As a machine that gets memory when it has little left: only then, and a moment later.
        nonlocal count
        reading = shrink()
        count += reading.available_bytes < GB
        grown = 8 * GB if count > 3 else 0
        return replace(reading, total_bytes=8 * GB + grown, available_bytes=reading.available_bytes + grown)

    report = touch_pages(10 * STEP, step_bytes=STEP, read=read)
    assert report.ended == "all"
    assert report.total_before_bytes == 8 * GB
    assert report.total_after_bytes == 16 * GB


def shrinking(*, by: int) -> Callable[[], HostMemoryReading]:
    left = CALM.available_bytes + by

    def read() -> HostMemoryReading:
        nonlocal left
        left = max(0, left - by)
        return replace(CALM, available_bytes=left)

    return read


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cgroup_limit_bytes": 4 * GB, "cgroup_used_bytes": 4 * GB - STEP}, "the cgroup's limit is near"),
        ({"swap_used_bytes": 65 * MB}, "began to swap"),
        ({"stalled_seconds": 0.6}, "stood still"),
        ({"available_bytes": 300 * MB}, "MemAvailable is down to 0.3 GB"),
    ],
)
def test_each_sign_of_harm_stops(change: dict[str, int], said: str) -> None:
    assert reason_to_stop(CALM, CALM, CALM, STEP, 1.0) is None
    reason = reason_to_stop(CALM, CALM, replace(CALM, **change), STEP, 1.0)
    assert reason is not None
    assert said in reason


def test_swap_of_before_and_old_stalls_do_not_count() -> None:
    used = replace(CALM, swap_used_bytes=5 * GB, stalled_seconds=100.0)
    assert reason_to_stop(used, used, used, STEP, 1.0) is None


@given(
    total=st.integers(MB, 2**50),
    available=st.integers(0, 2**50),
    limit=st.none() | st.integers(MB, 2**50),
    used=st.integers(0, 2**50),
    step=st.integers(4096, GB),
)
def test_a_step_is_never_begun_that_could_not_end(
    total: int, available: int, limit: int | None, used: int, step: int
) -> None:
    now = replace(CALM, total_bytes=total, available_bytes=available, cgroup_limit_bytes=limit, cgroup_used_bytes=used)
    if reason_to_stop(CALM, CALM, now, step, 1.0) is None:
        assert available >= step
        assert limit is None or limit - used >= step


def test_where_nothing_is_known_nothing_stops() -> None:
    nothing = HostMemoryReading(None, None, None, None, None, None, None, None)
    assert reason_to_stop(nothing, nothing, nothing, STEP, 1.0) is None
