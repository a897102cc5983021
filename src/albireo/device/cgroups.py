"""What the control groups of this process say, from its own group up to the root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["cgroup_folders"]


def cgroup_folders(controller: str, root: Path = Path("/")) -> Iterator[tuple[Path, int]]:
    """Go through the folders of every group this process is in: a child's limit may be wider than its parent's.

    Args:
        controller: "memory" or "cpu".
        root: where `proc` and `sys` are; another one in tests.

    Yields:
        A group's folder, and the version of cgroups (1 or 2) that says which files to look for in it. A folder may not
        exist: inside a container the path that the process knows is often not the one that is mounted.
    """
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, version = mount, 2
        elif controller in controllers.split(","):
            base, version = mount / controller, 1
        else:
            continue
        group = base / path.strip("/")
        while True:
            yield group, version
            if group in (base, base.parent):
                break
            group = group.parent
