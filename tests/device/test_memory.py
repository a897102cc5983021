from pathlib import Path

import pytest
import torch

from albireo.device import PeakMemory, device_total_bytes, read_host_memory
from albireo.device.memory import HostMemory

GB = 2**30


def make_root(folder: Path, *, total_gb: int, cgroup: str, limits: dict[str, str]) -> Path:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(f"MemTotal:       {total_gb * 2**20} kB\nMemFree: 1 kB\n")
    (folder / "proc/self/cgroup").write_text(cgroup)
    for name, text in limits.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def test_the_machine_limits_where_no_group_does(tmp_path: Path) -> None:
    root = make_root(tmp_path, total_gb=8, cgroup="0::/job\n", limits={"job/memory.max": "max"})
    assert read_host_memory(root) == HostMemory(8 * GB, "machine")


def test_a_parent_group_limits_too(tmp_path: Path) -> None:
    limits = {"jobs/memory.max": str(2 * GB), "jobs/mine/memory.max": str(4 * GB)}
    root = make_root(tmp_path, total_gb=8, cgroup="0::/jobs/mine\n", limits=limits)
    assert read_host_memory(root) == HostMemory(2 * GB, "cgroup")


def test_version_one_of_groups_is_read(tmp_path: Path) -> None:
    limits = {"memory/box/memory.limit_in_bytes": str(3 * GB)}
    root = make_root(tmp_path, total_gb=8, cgroup="5:cpu,memory:/box\n0::/\n", limits=limits)
    assert read_host_memory(root) == HostMemory(3 * GB, "cgroup")


def test_nobody_knows_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert read_host_memory(tmp_path) is None


def test_this_machine_says_something_sensible() -> None:
    memory = read_host_memory()
    assert memory is None or memory.total_bytes > 2**28
    assert device_total_bytes(torch.device("cpu")) is None


def test_the_hosts_peak_grows_with_what_is_touched() -> None:
    peaks = PeakMemory(torch.device("cpu"))
    before = peaks.read().host_peak_bytes
    size = before + 64 * 2**20
    block = torch.ones(size, dtype=torch.uint8)
    assert peaks.read().host_peak_bytes >= size
    assert peaks.read().device_peak_bytes == 0
    del block


def test_a_gpus_counters_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call for one of them has the allocator write down all of them."""
    calls = []
    counters = {"allocated_bytes.all.current": 1, "allocated_bytes.all.peak": 2, "reserved_bytes.all.peak": 3}

    def read(device: torch.device) -> dict[str, int]:
        calls.append(device)
        return counters

    monkeypatch.setattr("torch.cuda.memory.memory_stats", read)
    monkeypatch.setattr("torch.cuda.memory_stats", read)
    reading = PeakMemory(torch.device("cuda", 1)).read()
    assert (reading.device_bytes, reading.device_peak_bytes, reading.device_reserved_peak_bytes) == (1, 2, 3)
    assert calls == [torch.device("cuda", 1)]


def test_a_gpu_that_has_not_been_used_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.memory_stats", lambda _device: {})
    assert PeakMemory(torch.device("cuda")).read().device_peak_bytes == 0
