"""Runs of `albireo` on several ranks, each started in no time: launcher and ranks are forked off one process.

Everything else is as users have it: the launcher's own code, and processes of their own that can be killed one by one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import train_server
from train_server import TrainServer

_RANKS = "ALBIREO_TEST_RANKS"


class RankServer(TrainServer):
    """A train server whose runs may have `--gpus 2`.

    `crash_at` and `operations` of `start` count the file operations of the launcher and of one rank, by default the
    main one; `crash_rank` says another.
    """

    def __init__(self, folder: Path) -> None:
        # Its process is to run this file.
        before, train_server.__file__ = train_server.__file__, __file__
        try:
            super().__init__(folder)
        finally:
            train_server.__file__ = before
        self._counted = 0

    def start(self, arguments: list[str], *, crash_rank: int = 0, **how: Any) -> int:
        """Start a run and return its launcher's process number; see the class."""
        self._counted = crash_rank
        return super().start(arguments, **how)

    def ranks(self) -> list[int]:
        """Return the process numbers of the ranks of the run that was started last, as far as they have been started."""
        path = self._folder / f"{self._count}.ranks"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def kill(self, process: int) -> None:
        """Kill a process of the run that was started last, unless it has ended already."""
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    def wait_for_ranks(self) -> None:
        """Wait until no rank of the run that was started last is there any more, as after a kill of its launcher."""
        deadline = time.monotonic() + 60
        while any(_runs(process) for process in self.ranks()):
            assert time.monotonic() < deadline, f"ranks {self.ranks()} outlive their launcher"
            time.sleep(0.005)

    def _send(self, task: dict[str, Any]) -> None:
        if "arguments" in task:
            task = {**task, "counted_rank": self._counted, "ranks": str(self._folder / f"{self._count}.ranks")}
        super()._send(task)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


class _ForkedRank:
    """A forked rank, as far as the launcher knows a process."""

    def __init__(self, folder: Path, launcher: int, environment: dict[str, str], counted: int, listing: Path) -> None:
        self.args = ["rank", str(folder)]
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_rank(folder, launcher, environment, counted)
        with listing.open("a") as file:
            file.write(f"{self.pid}\n")

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.002)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _be_rank(folder: Path, launcher: int, environment: dict[str, str], counted: int) -> NoReturn:
    """In the forked process: be what `python -m albireo.distributed.rank` is."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)
        if int(environment["RANK"]) != counted:
            from albireo.files import FileOperations

            FileOperations.about_to = _ABOUT_TO  # type: ignore[method-assign]
        from albireo.distributed.rank import main

        code = main(folder, launcher)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  what an interpreter prints at its end
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fork_ranks(counted: int, listing: Path) -> None:
    """In a run's own process: have the launcher fork its ranks."""
    from albireo.distributed.launch import RANK_MODULE

    plain = subprocess.Popen

    def popen(arguments: Any, **how: Any) -> Any:
        if RANK_MODULE not in arguments:
            return plain(arguments, **how)
        folder, launcher = arguments[-2:]
        return _ForkedRank(Path(folder), int(launcher), how["env"], counted, listing)

    subprocess.Popen = popen  # type: ignore[assignment,misc]


def _run(task: dict[str, Any]) -> None:
    _fork_ranks(task["counted_rank"], Path(task["ranks"]))
    _PLAIN_RUN(task)


if __name__ == "__main__":
    from albireo.files import FileOperations

    _ABOUT_TO = FileOperations.about_to
    import albireo.distributed.rank
    import albireo.plugins.fully_sharded_optimizer  # noqa: F401

    _PLAIN_RUN, train_server._run = train_server._run, _run
    train_server._serve()
