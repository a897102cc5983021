from pathlib import Path

import torch

from albireo.device import device_total_bytes, read_host_memory
from albireo.device.memory import HostMemory, host_room_bytes

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


def test_a_groups_limit_is_the_room_whatever_the_machine_says(tmp_path: Path) -> None:
    """MemTotal may be more, in a container, and less, on a machine whose memory grows as it is touched."""
    for total_gb in (16, 512):
        limits = {"jobs/memory.max": str(128 * GB), "jobs/mine/memory.max": "max"}
        root = make_root(tmp_path / str(total_gb), total_gb=total_gb, cgroup="0::/jobs/mine\n", limits=limits)
        assert host_room_bytes(None, 1, root) == 124 * GB
        assert host_room_bytes(0, 4, root) == 31 * GB


def test_the_room_without_a_limit_is_the_machines_less_a_reserve(tmp_path: Path) -> None:
    root = make_root(tmp_path, total_gb=20, cgroup="0::/\n", limits={"memory.max": "max"})
    assert host_room_bytes(None, 1, root) == 19 * GB
    assert host_room_bytes(None, 2, root) == 19 * GB // 2


def test_a_cap_on_the_host_is_taken_as_it_is(tmp_path: Path) -> None:
    root = make_root(tmp_path, total_gb=20, cgroup="0::/\n", limits={})
    assert host_room_bytes(64 * GB, 1, root) == 64 * GB
    assert host_room_bytes(64 * GB, 4, root) == 16 * GB


def test_nobody_knows_the_room_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert host_room_bytes(None, 1, tmp_path) is None
