"""Ranks that are started once for all tests of a world size: a start costs many seconds, a case inside one very few.

A case is a function of a test file, `function(world, **arguments)`, that runs on every rank and returns JSON values.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from albireo.distributed import World, join_world, leave_world
from albireo.distributed.launch import rank_environment

# How long a case may take at all, and how long the others have once one rank has failed: they may wait for it for ever.
_CASE_SECONDS = 600.0
_SECONDS_AFTER_A_FAILURE = 20.0


class RankPool:
    """Several ranks that wait for cases.

    Args:
        world_size: how many.
        gpus: each has a GPU of its own, and they speak over NCCL. Without it they compute on the CPU: a context on each
            GPU that is never used would take seconds and memory from the tests that do use it.
    """

    def __init__(self, world_size: int, *, gpus: bool = False) -> None:
        hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
        self._folder = tempfile.TemporaryDirectory(prefix="albireo-test-ranks-")
        self._ranks = [
            subprocess.Popen(
                [sys.executable, __file__, str(Path(self._folder.name) / "store")],
                env={**rank_environment(rank, world_size, os.environ), **hidden},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        self._asked = 0

    def run(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Run a case on every rank and return each rank's result; a failure on any is raised with its traceback."""
        file = Path(sys.modules[function.__module__].__file__ or "")
        self._asked += 1
        task = json.dumps(
            {"number": self._asked, "file": str(file), "function": function.__name__, "arguments": arguments}
        )
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(task + "\n")
            rank.stdin.flush()
        answers = self._answers(function.__name__)
        failures = [answer["error"] for answer in answers.values() if "error" in answer]
        if failures:
            raise AssertionError(f"{function.__name__} failed on {len(failures)} ranks; the first:\n{failures[0]}")
        missing = [rank for rank in range(len(self._ranks)) if rank not in answers]
        assert not missing, f"{function.__name__}: no answer from ranks {missing}; their stacks are on stderr"
        return [answers[rank]["result"] for rank in range(len(self._ranks))]

    def _answers(self, name: str) -> dict[int, dict[str, Any]]:
        """Return what each rank answers; where some do not, all show where they are on stderr, and are ended."""
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + _CASE_SECONDS
        with selectors.DefaultSelector() as waiting:
            for number, rank in enumerate(self._ranks):
                assert rank.stdout is not None
                waiting.register(rank.stdout, selectors.EVENT_READ, number)
            while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in waiting.select(left):
                    line = self._ranks[key.data].stdout.readline()  # type: ignore[union-attr]
                    if not line:
                        raise RuntimeError(f"rank {key.data} of the pool died while it ran {name}")
                    answer = json.loads(line)
                    if answer["number"] != self._asked:
                        continue  # to a case whose test has ended before it
                    answers[key.data] = answer
                    waiting.unregister(key.fileobj)
                    if "error" in answers[key.data]:
                        deadline = min(deadline, time.monotonic() + _SECONDS_AFTER_A_FAILURE)
        if len(answers) < len(self._ranks):
            for rank in self._ranks:
                rank.send_signal(signal.SIGUSR1)
            time.sleep(1.0)  # for the stacks to be written
            for rank in self._ranks:
                rank.kill()
        return answers

    def close(self) -> None:
        """End the ranks."""
        for rank in self._ranks:
            assert rank.stdin is not None
            assert rank.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # a rank that was ended
                rank.stdin.close()
        for rank in self._ranks:
            try:
                rank.wait(timeout=20)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
            rank.stdout.close()
        self._folder.cleanup()


def _load(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("case_" + Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve(world: World, answers: Any) -> None:
    modules: dict[str, Any] = {}
    for line in sys.stdin:
        task = json.loads(line)
        try:
            if task["file"] not in modules:
                modules[task["file"]] = _load(task["file"])
            result = getattr(modules[task["file"]], task["function"])(world, **task["arguments"])
            answer = json.dumps({"number": task["number"], "result": result})
        except BaseException:  # noqa: BLE001  it goes back to the test that asked, be it an exit
            answer = json.dumps({"number": task["number"], "error": traceback.format_exc()})
        answers.write(answer + "\n")
        answers.flush()


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    # What a case prints must not be taken for an answer.
    answer_stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(join_world(store_path=Path(sys.argv[1])), answer_stream)
    leave_world()
