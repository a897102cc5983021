"""Where a step stands in its trace."""

from __future__ import annotations

from albireo.memory.budget import Use
from albireo.memory.itinerary import Itinerary
from albireo.memory.placement import Placement

A, B = frozenset({0, 1}), frozenset({0, 2})
TRACE = (
    Use(A, 0, "forward"), Use(B, 0, "forward"), Use(B, 0, "backward"), Use(A, 0, "backward"), Use(frozenset(), 0, "step"),
)  # fmt: skip
PLACEMENT = Placement(
    states_on_device=frozenset(),
    resident=frozenset(),
    keeps=frozenset({(1, 2), (2, 0)}),
    fetches=((2,), (), (1,), (), ()),
    device_bytes=0,
    host_bytes=0,
    traffic_bytes=0,
)


def test_a_step_that_keeps_to_the_trace_hears_what_to_fetch_and_to_keep() -> None:
    itinerary = Itinerary(TRACE, PLACEMENT)
    for _ in range(2):
        assert itinerary.enter(A, "forward") == (2,)
        assert not itinerary.keeps(1)
        assert not itinerary.keeps(2)  # not used yet
        assert itinerary.enter(B, "forward") == ()
        assert itinerary.keeps(2)
        assert not itinerary.keeps(0)
        assert itinerary.enter(B, "backward") == (1,)
        assert itinerary.keeps(0)
        assert not itinerary.keeps(2)  # the keep was for the use before
        assert itinerary.enter(A, "backward") == ()
        assert not itinerary.is_lost
        itinerary.restart()
        assert not any(itinerary.keeps(chunk) for chunk in range(3))


def test_a_step_that_leaves_it_is_lost_until_the_next() -> None:
    for chunks, phase in ((B, "backward"), (A, "forward"), (frozenset({9}), "forward")):
        itinerary = Itinerary(TRACE, PLACEMENT)
        itinerary.enter(A, "forward")
        assert itinerary.enter(chunks, phase) == ()
        assert itinerary.is_lost
        assert itinerary.enter(B, "forward") == ()
        assert not any(itinerary.keeps(chunk) for chunk in range(3))
        itinerary.restart()
        assert not itinerary.is_lost
        assert itinerary.enter(A, "forward") == (2,)


def test_a_step_that_is_longer_than_the_trace_is_lost() -> None:
    itinerary = Itinerary(TRACE, PLACEMENT)
    for use in TRACE[:-1]:
        itinerary.enter(use.chunks, use.phase)
    # As by one micro-batch more, after as many as were watched.
    for _ in range(3):
        assert itinerary.enter(A, "forward") == ()
        assert itinerary.is_lost
