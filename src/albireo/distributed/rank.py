"""One rank of `launch_ranks`: `python -m albireo.distributed.rank FOLDER LAUNCHER_PID`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from albireo.distributed.lifeline import tie_to_launcher
from albireo.distributed.notice_board import FileBoard
from albireo.distributed.watchdog import PATIENCE_SECONDS, WATCHDOG_EXIT_CODE, Watchdog, end_process
from albireo.distributed.world import World, join_world, leave_world
from albireo.errors import AlbireoError

__all__ = ["main"]


def main(folder: Path, launcher_pid: int) -> int:
    """Join the world, call the entry, and leave.

    Args:
        folder: where the launcher put the payload, and where an error is left for it.
        launcher_pid: the launcher's process.

    Returns:
        The exit code.
    """
    tie_to_launcher(launcher_pid)
    task = json.loads((folder / "payload.json").read_text())
    module_name, _, function_name = task["entry"].partition(":")
    try:
        world = join_world(store_path=folder / "store")
        with _watched(world, folder, task["patience_seconds"]):
            entry = getattr(importlib.import_module(module_name), function_name)
            entry(world, task["payload"])
    except AlbireoError as error:
        _report(folder, str(error), error.exit_code)
        # The other ranks may be waiting in a collective that will never come: leaving politely would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)
    leave_world()
    return 0


def _watched(world: World, folder: Path, patience_seconds: float | None) -> AbstractContextManager[object]:
    """Return a context in which the ranks watch each other."""
    if world.world_size == 1:
        return nullcontext()

    def end(text: str, *, speaks: bool) -> None:  # noqa: ARG001  the launcher speaks
        # The launcher tells it, once. It also kills the others, of which one may be stopped.
        _report(folder, f"{text}; all ranks are ended", WATCHDOG_EXIT_CODE)
        end_process(text, speaks=False)

    patience = PATIENCE_SECONDS if patience_seconds is None else patience_seconds
    board = FileBoard(folder, world.rank, world.world_size)
    return Watchdog(board, world.rank, patience_seconds=patience, stuck_seconds=patience, end=end, kills_stopped=False)


def _report(folder: Path, message: str, exit_code: int) -> None:
    """Leave an error for the launcher."""
    text = json.dumps({"message": message, "exit_code": exit_code})
    (folder / f"error-{os.environ['RANK']}.json").write_text(text)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
