from pathlib import Path

from albireo.device.probe_memory import HostMemoryReading, probe_host_memory

GB = 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


MEMINFO = f"MemTotal: {8 * 2**20} kB\nMemAvailable: {5 * 2**20} kB\nSwapTotal: {2 * 2**20} kB\nSwapFree: {2**20} kB\nHugePages_Total: 0"


def test_all_that_the_system_says_is_read(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/job",
        "proc/pressure/memory": "some avg10=0.00 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=2500000",
        "sys/fs/cgroup/job/memory.max": str(4 * GB),
        "sys/fs/cgroup/job/memory.current": str(3 * GB),
        # Files kept in memory are let go of when somebody wants it.
        "sys/fs/cgroup/job/memory.stat": f"anon {GB}\ninactive_file {GB}\nactive_file {GB // 2}",
    }
    assert probe_host_memory(write(tmp_path, files)) == HostMemoryReading(
        usable_bytes=4 * GB,
        limited_by="cgroup",
        total_bytes=8 * GB,
        available_bytes=5 * GB,
        cgroup_limit_bytes=4 * GB,
        cgroup_used_bytes=3 * GB - GB - GB // 2,
        swap_used_bytes=GB,
        stalled_seconds=2.5,
    )


def test_the_group_with_the_least_left_counts(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/all/mine",
        "sys/fs/cgroup/all/memory.max": str(6 * GB),
        "sys/fs/cgroup/all/memory.current": str(5 * GB),
        "sys/fs/cgroup/all/mine/memory.max": str(4 * GB),
        "sys/fs/cgroup/all/mine/memory.current": str(GB),
    }
    reading = probe_host_memory(write(tmp_path, files))
    assert (reading.cgroup_limit_bytes, reading.cgroup_used_bytes) == (6 * GB, 5 * GB)


def test_version_one_has_files_of_its_children_too(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/box",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(3 * GB),
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": str(2 * GB),
        "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 5\ntotal_inactive_file {GB}\ntotal_active_file 0",
        # No limit at all, as version 1 says it.
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(7 * GB),
    }
    reading = probe_host_memory(write(tmp_path, files))
    assert (reading.cgroup_limit_bytes, reading.cgroup_used_bytes) == (3 * GB, GB)


def test_what_the_system_does_not_say_is_not_known(tmp_path: Path) -> None:
    assert probe_host_memory(tmp_path) == HostMemoryReading(None, None, None, None, None, None, None, None)


def test_this_machine_can_be_read() -> None:
    reading = probe_host_memory()
    assert reading.total_bytes is not None
    assert reading.available_bytes is not None
    assert reading.usable_bytes is not None
    assert 0 < reading.available_bytes <= reading.total_bytes
    assert reading.usable_bytes <= reading.total_bytes
