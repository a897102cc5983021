"""Touches memory, a step for each line it reads: `python probe_touch_child.py STEP_BYTES`. Needs the standard library only.

It answers each line by `touched`, or by why it could not, and ends, giving all back, when there are no more lines.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["main"]


def main(step_bytes: int, lines: Iterable[str]) -> None:
    """Touch one step for each line.

    Args:
        step_bytes: how much to touch at a time.
        lines: what is asked; only that there is one counts.
    """
    # Should memory run out, this process is the one to be ended, before any that does something of use. Where there is
    # no such file it is the largest anyway.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    pages: list[mmap.mmap] = []
    mark = b"\x01" * (step_bytes // mmap.PAGESIZE)
    for _ in lines:
        try:
            step = mmap.mmap(-1, step_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            sys.stdout.write(f"{error.strerror}\n")
            return
        # One byte a page: the system hands a page out when it is written to, not when it is asked for.
        step[:: mmap.PAGESIZE] = mark
        pages.append(step)
        sys.stdout.write("touched\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.stdin)
