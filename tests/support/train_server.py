"""Runs of `albireo`, each in a process of its own that starts in no time: it is forked off one that has imported all.

The server itself never computes anything, so that no thread pool is there to be lost in the fork. Its runs see no GPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative: by which signal), and all that it printed."""

    code: int
    output: str
    errors: str


class TrainServer:
    """Starts runs; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._answer() == "ready"

    def start(self, arguments: list[str], *, crash_at: int | None = None, operations: Path | None = None) -> int:
        """Start a run and return its process number.

        Args:
            arguments: of `albireo`.
            crash_at: end the process, without any cleaning up, before the file operation of this number.
            operations: a file that gets a line for each operation.
        """
        self._count += 1
        task = {
            "arguments": arguments,
            "crash_at": crash_at,
            "operations": str(operations) if operations else None,
            "output": str(self._folder / f"{self._count}.out"),
            "errors": str(self._folder / f"{self._count}.err"),
        }
        self._send(task)
        return int(self._answer())

    def wait(self) -> Ended:
        """Wait for the run that was started last."""
        self._send({"wait": True})
        code = int(self._answer())
        texts = [(self._folder / f"{self._count}.{end}").read_text() for end in ("out", "err")]
        return Ended(code, *texts)

    def run(self, arguments: list[str], **how: Any) -> Ended:
        """Start a run and wait for it."""
        self.start(arguments, **how)
        return self.wait()

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _send(self, task: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _run(task: dict[str, Any]) -> None:
    """In the forked process: run `albireo` and exit with its code."""
    # Tests that run in the background of a shell have inherited that Ctrl-C is ignored; a run in front has not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(task["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(task["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")
    _count_operations(task["crash_at"], task["operations"])
    from albireo.cli.main import main

    try:
        main(task["arguments"])
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def _count_operations(crash_at: int | None, operations: str | None) -> None:
    if crash_at is None and operations is None:
        return
    from albireo.files import FileOperations

    count = 0

    def about_to(self: FileOperations, operation: str, path: Path) -> None:
        nonlocal count
        if count == crash_at:
            os._exit(137)
        count += 1
        if operations is not None:
            with Path(operations).open("a") as file:
                file.write(f"{operation} {path}\n")

    # This process is the test's own, and ends with the run.
    FileOperations.about_to = about_to  # type: ignore[method-assign]


def _serve() -> None:
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.opt.modeling_opt  # noqa: F401

    import albireo.bench.report
    import albireo.cli.main
    import albireo.training.start  # noqa: F401

    print("ready", flush=True)
    child = 0
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            _run(task)
        print(child, flush=True)


if __name__ == "__main__":
    _serve()
