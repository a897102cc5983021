"""When ranks are ended, and above all when they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.distributed.judging import Seen, judge
from albireo.distributed.vital_signs import VitalSign

PATIENCE = 25.0
BASE = VitalSign(beat=9, pid=1, started=1, host="here", activity="forward", module="layers.3")


def waits(count: int, seconds: float = 60.0, collective: str = "all_reduce", **more: Any) -> Seen:
    sign = replace(BASE, collective=collective, counts=(count,), waits_seconds=seconds, idle_share=0.0)
    return Seen(replace(sign, **more), 0.5, "R")


def runs(count: int, **more: Any) -> Seen:
    return Seen(replace(BASE, counts=(count,), **more), 0.5, "R")


def stuck(count: int, seconds: float, limit: float = 25.0) -> Seen:
    return runs(count, stuck_seconds=seconds, stuck_limit_seconds=limit)


def said(*ranks: Seen) -> str | None:
    verdict = judge(dict(enumerate(ranks)), PATIENCE)
    return verdict and verdict.text


WHERE = r"rank 0 waits for it in all_reduce \(collective 7\), in forward of layers\.3"


@pytest.mark.parametrize(
    ("culprit", "reason"),
    [
        (runs(6)._replace(state=""), "has ended without a word, last seen in forward of layers.3"),
        (runs(7)._replace(state="Z"), "has ended without a word, last seen in forward of layers.3"),
        (runs(6)._replace(state="T", silent_seconds=18.0), "is stopped by a signal, last seen in forward of layers.3"),
        (waits(7)._replace(state="T", silent_seconds=18.0), "is stopped by a signal, last seen in forward of layers.3"),
        (
            runs(6)._replace(state=None, silent_seconds=101.0),
            "on here has not been heard of for 101 s, last seen in forward of layers.3",
        ),
        (runs(6, ended="left"), "has left the others"),
        (runs(7, ended="failed"), "has failed; its message says why"),
        (stuck(6, 25.5), "has not gone on for 26 s, in forward of layers.3"),
    ],
)
def test_who_will_not_come_is_named_with_who_waits(culprit: Seen, reason: str) -> None:
    text = f"rank 1 {reason}; rank 0 waits for it in all_reduce (collective 7), in forward of layers.3"
    assert said(waits(7), culprit) == text
    # Among many, the others being busy or waiting too.
    assert judge({0: waits(7), 1: runs(6), 2: waits(7), 5: culprit}, PATIENCE) == (5, text.replace("rank 1", "rank 5"))


@pytest.mark.parametrize(
    "other",
    [
        runs(6),  # a save of half an hour, an evaluation, a download
        runs(6, activity="saving"),
        stuck(6, 24.0),
        stuck(6, 500.0, limit=float("inf")),  # the first step
        stuck(6, 500.0, limit=900.0),  # whose steps take minutes
        stuck(6, 60.0)._replace(silent_seconds=15.0),  # what it says is old: it may have gone on
        stuck(7, 60.0),  # it is in the same, or behind it
        runs(6)._replace(state="R", silent_seconds=1000.0),  # it holds the interpreter's lock
        runs(6)._replace(state="D", silent_seconds=1000.0),
        runs(6)._replace(state="t", silent_seconds=1000.0),  # in a debugger
        runs(6)._replace(state="T", silent_seconds=10.0),
        runs(6)._replace(state=None, silent_seconds=90.0),
        runs(7, ended="left"),  # it was through with it
        waits(7),  # the same one: large, over a slow network
        waits(7, collective="broadcast", idle_share=0.1),  # something is on its way
        waits(6, seconds=40.0, collective="broadcast"),
        waits(7, collective="recv"),
        waits(7, collective="broadcast", of_all_ranks=False),
        waits(7, seconds=20.0, collective="broadcast"),
    ],
)
def test_others_are_waited_for(other: Seen) -> None:
    assert said(waits(7), other) is None
    assert said(other, waits(7)) is None
    assert said(waits(7), other, waits(7)) is None


def test_who_waits_among_some_ranks_only_is_no_witness() -> None:
    assert said(waits(7, of_all_ranks=False), runs(6)._replace(state="")) is None
    assert said(waits(7, collective="", counts=(7,)), runs(6)._replace(state="")) is not None
    assert said(waits(7, seconds=5.0), runs(6)._replace(state="")) is None


def test_ranks_in_different_collectives_wait_for_each_other() -> None:
    text = said(waits(7, seconds=26.0), waits(7, seconds=30.0, collective="broadcast"), waits(7))
    assert text == (
        "ranks wait for each other in different collectives: rank 0 in all_reduce (collective 7), in forward of layers.3; "
        "rank 1 in broadcast (collective 7), in forward of layers.3"
    )
    # One that is ahead may be a broadcast's source, which need not wait: longer to be sure.
    assert said(waits(8, seconds=51.0), waits(7, seconds=51.0, collective="broadcast")) is not None
    assert said(waits(8, seconds=51.0), waits(7, seconds=51.0, collective="broadcast"), runs(7)) is None


HEALTHY = st.one_of(
    st.builds(runs, st.integers(0, 5), activity=st.sampled_from(["", "saving", "evaluation"])),
    st.builds(waits, st.integers(0, 5), st.floats(0, 1e5), st.just("all_reduce")),
    st.builds(stuck, st.integers(0, 5), st.floats(0, 20), st.floats(25, 1e6)),
    st.builds(
        lambda count, silent, state: runs(count)._replace(silent_seconds=silent, state=state),
        st.integers(0, 5),
        st.floats(0, 1e5),
        st.sampled_from(["R", "S", "D", "t"]),
    ),
)


@given(st.lists(HEALTHY, min_size=1, max_size=6))
def test_no_crowd_of_healthy_ranks_is_ever_ended(ranks: list[Seen]) -> None:
    assert said(*ranks) is None
