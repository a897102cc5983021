import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from albireo.distributed import lifeline

# The other systems' way is tried here too: it needs nothing that Linux lacks.
WATCH = "import runpy, sys; m = runpy.run_path({path!r}); sys.exit(m['watch_over'](int(sys.argv[1]), sys.argv[2:]))"
WAYS = {
    "becomes": [sys.executable, "-I", "-S", lifeline.__file__],
    "watches": [sys.executable, "-I", "-S", "-c", WATCH.format(path=lifeline.__file__)],
}
LAUNCHER = """
import os, subprocess, sys, time
subprocess.Popen([*sys.argv[2:], str(os.getpid()), sys.executable, "-c",
    "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)", sys.argv[1]])
time.sleep(600)
"""


@pytest.fixture(params=WAYS)
def tied(request: pytest.FixtureRequest) -> list[str]:
    return WAYS[request.param]


def test_the_command_gets_its_arguments_and_its_code_comes_back(tied: list[str]) -> None:
    program = "import sys; print(sys.argv[1:]); sys.exit(7)"
    command = [*tied, str(os.getpid()), sys.executable, "-c", program, "two words", "", "$x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "['two words', '', '$x']\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_signal_that_ends_the_command_is_passed_back(tied: list[str], number: signal.Signals) -> None:
    program = f"import os; os.kill(os.getpid(), {int(number)})"
    done = subprocess.run([*tied, str(os.getpid()), sys.executable, "-c", program], check=False)
    assert done.returncode == -number


def test_the_command_dies_with_a_launcher_that_is_killed(tied: list[str], tmp_path: Path) -> None:
    file = tmp_path / "pid"
    launcher = subprocess.Popen([sys.executable, "-I", "-S", "-c", LAUNCHER, str(file), *tied])
    until(lambda: file.exists() and file.read_text() != "", seconds=30)
    command = int(file.read_text())
    assert runs(command)
    launcher.kill()
    launcher.wait()
    until(lambda: not runs(command), seconds=10)


def test_nothing_is_run_for_a_launcher_that_is_already_gone() -> None:
    gone = subprocess.Popen([sys.executable, "-I", "-S", "-c", ""])
    gone.wait()
    done = subprocess.run(
        [*WAYS["becomes"], str(gone.pid), sys.executable, "-c", "print('ran')"], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")


def runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or while it was read
        return False
    return state != "Z"


def until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.02)
