"""What a step that is watched tells, with a scripted reader of the memory."""

from __future__ import annotations

import pytest
import torch

from albireo.distributed import World
from albireo.errors import AlbireoError
from albireo.memory.budget import Use
from albireo.memory.stats import MemStatsCollector

ALONE = World(0, 1, 0, torch.device("cpu"))


class Device:
    """A device whose peaks and whose model data a test says."""

    def __init__(self) -> None:
        self.model = 0
        self.peak = 0

    def peak_bytes(self) -> int:
        peak, self.peak = self.peak, 0
        return peak

    def collector(self) -> MemStatsCollector:
        return MemStatsCollector(self.peak_bytes, lambda: self.model)


class Ranks(World):
    """Two ranks, of which the other says what a test says."""

    others: list[list[float]] = []  # noqa: RUF012  each test sets its own

    def gather_numbers(self, numbers: list[float]) -> list[list[float]]:
        other = self.others.pop(0)
        return [numbers, [number if other_number is None else other_number for number, other_number in zip(numbers, other, strict=False)] if other else numbers]  # fmt: skip


def test_each_use_has_the_peak_until_the_next_beside_model_data() -> None:
    device = Device()
    collector = device.collector()
    collector.start()
    device.peak, device.model = 1000, 800  # before the first use: nobody's
    collector.enter(frozenset({0}), "forward")
    device.peak = 1100
    collector.change()  # 300 beside 800; what chunks take changes now
    device.model = 500
    device.peak = 700
    collector.enter(frozenset({0, 1}), "forward")  # 200 beside 500
    device.peak = 1500
    collector.change()  # 1000
    device.peak = 600
    collector.change()  # 100: less than before
    collector.enter(frozenset({0, 1}), "backward")
    device.peak = 540
    trace = collector.finish(ALONE, step_bytes=77)
    assert trace == (
        Use(frozenset({0}), 300, "forward"),
        Use(frozenset({0, 1}), 1000, "forward"),
        Use(frozenset({0, 1}), 40, "backward"),
        Use(frozenset(), 77, "step"),
    )


def test_nothing_is_noted_or_read_unless_it_collects() -> None:
    device = Device()
    collector = device.collector()
    device.peak = 5
    collector.enter(frozenset({0}), "forward")
    collector.change()
    assert device.peak == 5  # somebody else may want to know
    collector.start()
    assert collector.is_collecting
    assert collector.finish(ALONE, step_bytes=1) == (Use(frozenset(), 1, "step"),)
    assert not collector.is_collecting


def test_a_step_that_is_begun_again_forgets_the_one_before() -> None:
    device = Device()
    collector = device.collector()
    collector.start()
    collector.enter(frozenset({3}), "forward")
    device.peak = 9_000
    collector.start()
    collector.enter(frozenset({4}), "forward")
    device.peak = 10
    assert collector.finish(ALONE, step_bytes=0)[0] == Use(frozenset({4}), 10, "forward")


def test_what_is_less_than_model_data_is_nothing() -> None:
    """Memory of chunks that came and went between two looks is not counted against the rest."""
    device = Device()
    collector = device.collector()
    collector.start()
    collector.enter(frozenset({0}), "forward")
    device.peak, device.model = 10, 50
    assert collector.finish(ALONE, step_bytes=0)[0].other_bytes == 0


def two_ranks(*others: list[float]) -> World:
    ranks = Ranks(0, 2, 0, torch.device("cpu"))
    object.__setattr__(ranks, "others", list(others))
    return ranks


def test_ranks_agree_on_the_largest_numbers() -> None:
    device = Device()
    collector = device.collector()
    collector.start()
    collector.enter(frozenset({0}), "forward")
    device.peak = 100
    collector.enter(frozenset({0}), "backward")
    device.peak = 30
    trace = collector.finish(two_ranks([], [], [40.0, 90.0]), step_bytes=0)
    assert [use.other_bytes for use in trace] == [100, 90, 0]


@pytest.mark.parametrize("others", [[[3.0]], [[], [1.0, 2.0]]], ids=["more of them", "others"])
def test_ranks_that_used_other_chunks_are_told(others: list[list[float]]) -> None:
    collector = Device().collector()
    collector.start()
    collector.enter(frozenset({0}), "forward")
    collector.enter(frozenset({1}), "forward")
    with pytest.raises(AlbireoError, match="different orders"):
        collector.finish(two_ranks(*others), step_bytes=0)
