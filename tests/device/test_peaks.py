"""Peaks of a run and of its parts, by one reader: torch has a single counter, which starts anew for each part."""

from __future__ import annotations

import pytest
import torch

from albireo.device import PeakMemory
from albireo.plugins import TorchDDPPlugin

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


class Counters:
    """Stands in for torch's counters of one GPU."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak = self.reserved_peak = self.reads = 0

    def use(self, *allocated: int) -> None:
        for amount in allocated:
            self.allocated = amount
            self.reserved = max(self.reserved, amount + 10)
            self.peak, self.reserved_peak = max(self.peak, amount), max(self.reserved_peak, self.reserved)

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def read(self, device: torch.device) -> dict[str, int]:
        assert device == GPU
        self.reads += 1
        return {
            "allocated_bytes.all.current": self.allocated,
            "allocated_bytes.all.peak": self.peak,
            "reserved_bytes.all.peak": self.reserved_peak,
        }

    def reset(self, device: torch.device) -> None:
        assert device == GPU
        self.peak, self.reserved_peak = self.allocated, self.reserved


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    counters = Counters()
    # The functions for single counters read all of them by the name inside.
    monkeypatch.setattr("torch.cuda.memory.memory_stats", counters.read)
    monkeypatch.setattr("torch.cuda.memory_stats", counters.read)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", counters.reset)
    return counters


def test_the_hosts_peak_grows_with_what_is_touched() -> None:
    peaks = PeakMemory(torch.device("cpu"))
    before = peaks.read().host_peak_bytes
    size = before + 64 * 2**20
    block = torch.ones(size, dtype=torch.uint8)
    assert peaks.read().host_peak_bytes >= size
    assert peaks.read().device_peak_bytes == 0
    del block


def test_a_gpus_counters_are_read_once(counters: Counters) -> None:
    """Each call for one of them has the allocator write down all of them."""
    counters.use(2, 1)
    reading = PeakMemory(GPU).read()
    assert (reading.device_bytes, reading.device_peak_bytes, reading.device_reserved_peak_bytes) == (1, 2, 12)
    assert counters.reads == 1


def test_a_gpu_that_has_not_been_used_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.memory_stats", lambda _device: {})
    assert PeakMemory(torch.device("cuda")).read().device_peak_bytes == 0


def test_the_peak_of_a_run_outlives_the_intervals_that_are_measured(counters: Counters) -> None:
    peaks = PeakMemory(GPU)
    counters.use(50, 20)
    assert peaks.interval_peak_bytes() == 50
    counters.empty_cache()
    assert peaks.interval_peak_bytes() == 20
    counters.use(30, 25, 5)
    # Reading the whole is no end of an interval.
    assert peaks.read().device_peak_bytes == 50
    assert peaks.interval_peak_bytes() == 30
    assert peaks.interval_peak_bytes() == 5
    reading = peaks.read()
    assert (reading.device_bytes, reading.device_peak_bytes, reading.device_reserved_peak_bytes) == (5, 50, 60)
    counters.use(80)
    assert peaks.read().device_peak_bytes == 80
    assert peaks.read().device_reserved_peak_bytes == 90


def test_a_reset_begins_the_whole_anew_and_leaves_the_interval(counters: Counters) -> None:
    peaks = PeakMemory(GPU)
    counters.use(50, 10)
    peaks.interval_peak_bytes()
    counters.use(40, 10)
    counters.empty_cache()
    peaks.reset()
    assert peaks.read().device_peak_bytes == 10
    assert peaks.read().device_reserved_peak_bytes == 10
    counters.use(20)
    assert peaks.interval_peak_bytes() == 40
    assert peaks.read().device_peak_bytes == 20


def test_a_cpu_has_no_peak_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = PeakMemory(CPU)
    peaks.reset()
    assert peaks.interval_peak_bytes() == 0
    assert peaks.read().device_peak_bytes == 0


def test_all_who_measure_one_plugins_run_share_a_reader() -> None:
    one, other = TorchDDPPlugin(), TorchDDPPlugin()
    assert one.peaks(CPU) is one.peaks(CPU)
    assert one.peaks(CPU) is not other.peaks(CPU)
    assert one.peaks(GPU).device == GPU
