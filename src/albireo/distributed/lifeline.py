"""A rank dies with its launcher, even if the launcher is killed without warning."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

__all__ = ["tie_to_launcher"]

_PR_SET_PDEATHSIG = 1


def tie_to_launcher(launcher_pid: int) -> None:
    """Have this process die when its launcher does.

    On Linux the kernel sees to it, even while a thread holds the interpreter's lock; elsewhere a thread looks.

    Args:
        launcher_pid: the process that started this one.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(launcher_pid,), name="lifeline", daemon=True).start()
    # The launcher may have died before the kernel was asked; then nobody is going to tell.
    if os.getppid() != launcher_pid:
        os._exit(1)


def _watch(launcher_pid: int) -> None:
    never = threading.Event()
    while os.getppid() == launcher_pid:
        never.wait(1.0)
    os._exit(1)
