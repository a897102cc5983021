import os
from pathlib import Path

import pytest

from albireo.device.cores import usable_cores


@pytest.fixture
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_without_a_word_of_the_system_each_processor_is_a_core(tmp_path: Path, four_processors: None) -> None:
    assert usable_cores(tmp_path) == 4


def test_two_processors_of_one_core_count_once(tmp_path: Path, four_processors: None) -> None:
    siblings = {
        f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list": f"{number % 2},{number % 2 + 2}"
        for number in range(4)
    }
    assert usable_cores(write(tmp_path, siblings)) == 2


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "20000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000"}, 4),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        # A container's own path is the host's, and only the mounted root is to be seen.
        ({"proc/self/cgroup": "0::/docker/1234", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
    ],
)
def test_a_quota_bounds_the_cores(tmp_path: Path, four_processors: None, files: dict[str, str], cores: int) -> None:
    assert usable_cores(write(tmp_path, files)) == cores
