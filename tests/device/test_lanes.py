"""A simulated lane is as late as a GPU may be, and shows whoever does not wait; every lane keeps its order."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from albireo.device.lanes import Arrival, CopyLane, ImmediateLane
from albireo.device.simulated_lane import SimulatedLane


def ones(numel: int = 4, **more: torch.dtype) -> torch.Tensor:
    return torch.ones(numel, **more)


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def joined(thread: threading.Thread) -> None:
    thread.join(10)
    assert not thread.is_alive(), "a thread waits for ever"


@pytest.mark.parametrize("make", [ImmediateLane, SimulatedLane])
@pytest.mark.parametrize("end", ["wait", "synchronize"])
def test_a_copy_is_there_after_its_arrival(make: type[CopyLane], end: str) -> None:
    lane = make()
    lane.follow()
    target = torch.zeros(4, dtype=torch.bfloat16)
    arrival = lane.copy(target, ones())
    getattr(arrival, end)()
    getattr(arrival, end)()
    assert target.tolist() == [1.0] * 4


@pytest.mark.parametrize("make", [ImmediateLane, SimulatedLane])
def test_a_copy_of_another_shape_is_refused_at_once(make: type[CopyLane]) -> None:
    with pytest.raises(ValueError, match=r"\(1,\) does not fit a target of \(4,\)"):
        make().copy(torch.zeros(4), torch.ones(1))


@pytest.mark.parametrize("make", [ImmediateLane, SimulatedLane])
def test_nothing_on_a_lane_is_recorded_for_autograd(make: type[CopyLane]) -> None:
    lane = make()
    weight = torch.ones(4, requires_grad=True)
    made: list[torch.Tensor] = []
    lane.copy(torch.zeros(4), weight).wait()
    lane.copy(weight, torch.zeros(4)).wait()
    lane.run(lambda: made.append(weight * 2)).wait()
    assert not made[0].requires_grad
    assert weight.is_leaf
    assert weight.tolist() == [0.0] * 4


def test_an_immediate_lane_runs_its_callers_code() -> None:
    lane = ImmediateLane()
    target = torch.zeros(4)
    with lane.running():
        target.copy_(ones())
    lane.drain()
    assert target.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
)
def test_whoever_does_not_wait_reads_what_shows(dtype: torch.dtype) -> None:
    lane = SimulatedLane()
    flat = torch.zeros(6).to(dtype)
    arrival = lane.copy(flat[1:4], torch.zeros(3).to(dtype))
    middle = flat[1:4].float()
    assert bool(middle.isnan().all() if dtype.is_floating_point else (middle != 0).all())
    assert flat[[0, 4, 5]].float().tolist() == [0.0] * 3
    arrival.wait()
    assert flat.float().tolist() == [0.0] * 6


def test_a_source_that_is_written_too_early_is_seen() -> None:
    lane = SimulatedLane()
    source, target = ones(), torch.zeros(4)
    arrival = lane.copy(target, source)
    source.fill_(7.0)
    arrival.wait()
    assert target.tolist() == [7.0] * 4


def test_what_is_before_an_arrival_has_run_and_what_is_after_it_has_not() -> None:
    lane = SimulatedLane()
    seen: list[int] = []
    arrivals = [lane.run(lambda n=n: seen.append(n)) for n in range(5)]  # type: ignore[misc]
    assert seen == []
    arrivals[2].wait()
    arrivals[0].synchronize()
    assert seen == [0, 1, 2]
    lane.drain()
    assert seen == [0, 1, 2, 3, 4]
    lane.drain()


def test_what_an_earlier_copy_still_reads_is_not_spoiled() -> None:
    """In the lane's order it is read before it is overwritten: right on a GPU, and so here."""
    lane = SimulatedLane()
    first, second = torch.zeros(4), ones()
    lane.copy(first, second)
    lane.copy(second, torch.full((4,), 2.0)).wait()
    assert (first.tolist(), second.tolist()) == ([1.0] * 4, [2.0] * 4)
    lane.run(lambda: first.copy_(second))
    lane.copy(second, torch.full((4,), 3.0)).wait()
    assert (first.tolist(), second.tolist()) == ([2.0] * 4, [3.0] * 4)


def test_a_lane_says_what_a_copy_still_uses() -> None:
    lane = SimulatedLane()
    flat, source, other = torch.zeros(8), ones(), torch.zeros(8)
    arrival = lane.copy(flat[:4], source)
    assert lane.is_pending(flat[4:])
    assert lane.is_pending(source)
    assert not lane.is_pending(other)
    arrival.wait()
    assert not lane.is_pending(flat)


def test_a_lane_may_wait_for_another() -> None:
    inward, onward = SimulatedLane(), SimulatedLane()
    middle, target = torch.zeros(4), torch.zeros(4)
    came = inward.copy(middle, ones())

    def then() -> None:
        came.wait()
        target.copy_(middle)

    onward.run(then).wait()
    assert target.tolist() == [1.0] * 4


def test_what_raises_late_is_raised_at_the_wait_and_at_each_of_its_own() -> None:
    lane = SimulatedLane()
    target = torch.zeros(4)
    failed = lane.run(lambda: 1 // 0)
    copied = lane.copy(target, ones())
    with pytest.raises(ZeroDivisionError):
        copied.wait()
    assert target.tolist() == [0.0] * 4
    copied.wait()
    assert target.tolist() == [1.0] * 4
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failed.wait()


def test_draining_runs_all_and_raises_the_first_error() -> None:
    lane = SimulatedLane()
    target = torch.zeros(4)
    lane.run(lambda: 1 // 0)
    lane.run(lambda: {}["never"])  # type: ignore[misc]
    lane.copy(target, ones())
    with pytest.raises(ZeroDivisionError):
        lane.drain()
    assert target.tolist() == [1.0] * 4
    lane.drain()


def test_waiting_for_oneself_is_refused() -> None:
    lane = SimulatedLane()
    later: list[Arrival] = []

    def wait_for_later() -> None:
        later[0].wait()

    first = lane.run(wait_for_later)
    later.append(lane.run(lambda: None))
    with pytest.raises(RuntimeError, match="comes after it"):
        first.wait()
    draining = lane.run(lane.drain)
    with pytest.raises(RuntimeError, match="wait for itself"):
        draining.wait()


def test_an_interrupt_leaves_the_lane_usable() -> None:
    lane = SimulatedLane()

    def interrupt() -> None:
        raise KeyboardInterrupt

    stopped, target = lane.run(interrupt), torch.zeros(4)
    copied = lane.copy(target, ones())
    with pytest.raises(KeyboardInterrupt):
        stopped.wait()
    copied.wait()
    assert target.tolist() == [1.0] * 4


def test_a_callers_code_cannot_run_late() -> None:
    with pytest.raises(RuntimeError, match=r"run\(\)"):
        SimulatedLane().running()


def test_threads_enqueue_and_wait_at_once() -> None:
    lane = SimulatedLane()
    running = threading.Lock()
    order: list[int] = []
    wrong: list[str] = []

    def work(owner: int, number: int) -> None:
        if not running.acquire(blocking=False):
            wrong.append("two at once")
            return
        order.append(owner * 1000 + number)
        running.release()

    def use(owner: int) -> None:
        kept = []
        for number in range(200):
            target = torch.zeros(8)
            kept.append((lane.copy(target, torch.full((8,), float(number))), target, number))
            arrival = lane.run(lambda number=number: work(owner, number))  # type: ignore[misc]
            if number % 7 == owner % 7:
                arrival.synchronize()
            if number % 5 == 0:
                for copied, there, value in kept:
                    copied.wait()
                    if there.tolist() != [float(value)] * 8:
                        wrong.append("not there")
                kept.clear()

    threads = [in_thread(lambda owner=owner: use(owner)) for owner in range(4)]  # type: ignore[misc]
    for thread in threads:
        joined(thread)
    lane.drain()
    assert wrong == []
    for owner in range(4):
        assert [n for n in order if n // 1000 == owner] == [owner * 1000 + number for number in range(200)]


def test_two_threads_on_two_lanes_that_wait_for_each_other_end() -> None:
    """Lane A's second waits for lane B's third, whose second waits for lane A's first: in order on a GPU, so here."""
    one, two = SimulatedLane(), SimulatedLane()
    at_first, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def first() -> None:
        at_first.set()
        go_on.wait(10)
        done.append("one 1")

    one_first = one.run(first)
    two.run(lambda: done.append("two 1"))

    def second() -> None:
        go_on.set()
        one_first.wait()
        done.append("two 2")

    two.run(second)
    two_third = two.run(lambda: done.append("two 3"))

    def last() -> None:
        two_third.wait()
        done.append("one 2")

    one_last = one.run(last)
    thread = in_thread(one_last.synchronize)
    assert at_first.wait(10)
    two_third.synchronize()
    joined(thread)
    assert done == ["two 1", "one 1", "two 2", "two 3", "one 2"]
