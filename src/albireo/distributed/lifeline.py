"""A rank dies with its launcher, even if the launcher is killed without warning.

Run as a file, it ties a command of any kind: `python lifeline.py LAUNCHER_PID COMMAND...`. It is light on purpose and
imports nothing of the package, so that this costs some hundredths of a second.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

__all__ = ["run_tied", "tie_to_launcher", "watch_over"]

_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.5


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


def run_tied(launcher_pid: int, command: Sequence[str]) -> NoReturn:
    """Run a command that dies with the launcher, and end as it does.

    On Linux this process becomes the command: what the kernel was asked for outlives that.

    Args:
        launcher_pid: the process that started this one.
        command: the program, with its path, and its arguments.
    """
    if sys.platform.startswith("linux"):
        tie_to_launcher(launcher_pid)
        os.execv(command[0], list(command))  # noqa: S606  the command is the launcher's own
    else:
        sys.exit(watch_over(launcher_pid, command))


def watch_over(launcher_pid: int, command: Sequence[str]) -> int:
    """Run a command as a child, and end it when the launcher is gone: for systems whose kernel cannot.

    This process leads a process group of its own, so a signal for the group reaches the command directly.

    Args:
        launcher_pid: the process that started this one.
        command: the program, with its path, and its arguments.

    Returns:
        The command's exit code; if a signal ended it, this process ends by the same.
    """
    # Unlike "ignore", a handler is not inherited: the command meets every signal as if it stood alone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, _leave_it_to_the_command)
    child = subprocess.Popen(list(command))
    while True:
        try:
            code = child.wait(_LOOK_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if os.getppid() != launcher_pid:
                child.kill()
    if code < 0:
        if -code != signal.SIGKILL:  # which nobody can handle, nor stop handling
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _leave_it_to_the_command(_number: int, _frame: FrameType | None) -> None:
    pass


def _watch(launcher_pid: int) -> None:
    never = threading.Event()
    while os.getppid() == launcher_pid:
        never.wait(1.0)
    os._exit(1)


if __name__ == "__main__":
    run_tied(int(sys.argv[1]), sys.argv[2:])
