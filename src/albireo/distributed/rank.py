"""One rank of `launch_ranks`: `python -m albireo.distributed.rank FOLDER LAUNCHER_PID`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from albireo.distributed.lifeline import tie_to_launcher
from albireo.distributed.world import join_world, leave_world
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
        entry = getattr(importlib.import_module(module_name), function_name)
        entry(world, task["payload"])
    except AlbireoError as error:
        report = json.dumps({"message": str(error), "exit_code": error.exit_code})
        (folder / f"error-{os.environ['RANK']}.json").write_text(report)
        # The other ranks may be waiting in a collective that will never come: leaving politely would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)
    leave_world()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
