"""The names of checkpoints in their folder, whole, unfinished and on their way out."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = [
    "again_path",
    "checkpoint_path",
    "find_checkpoints",
    "is_leftover",
    "parse_name",
    "step_name",
    "step_path",
    "trash_path",
    "unfinished_path",
]

_UNFINISHED = ".tmp-"
_TRASH = ".trash-"
_AGAIN = ".again"
_STEP_NAME = re.compile(r"step-([0-9]{8,18})(\.again)?")


def step_name(step: int) -> str:
    """Return the name of the checkpoint of a step; names sort as their steps do."""
    return f"step-{step:08d}"


def unfinished_path(folder: Path, step: int) -> Path:
    """Return where a checkpoint is written before it is whole."""
    return folder / f"{_UNFINISHED}{step_name(step)}"


def again_path(folder: Path, step: int) -> Path:
    """Return where a whole checkpoint waits while an older one of the same step has the name."""
    return folder / f"{step_name(step)}{_AGAIN}"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the newest checkpoint of a step is, or belongs."""
    again = again_path(folder, step)
    return again if again.exists() else step_path(folder, step)


def parse_name(name: str) -> tuple[int, bool] | None:
    """Return the step and whether the name is of a second save, or None if it is no checkpoint's name."""
    match = _STEP_NAME.fullmatch(name)
    if match is None or step_name(int(match.group(1))) != name.removesuffix(_AGAIN):
        return None
    return int(match.group(1)), match.group(2) is not None


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the step and the path of all that has a checkpoint's name, newest first; nothing is opened.

    Raises:
        OSError: the folder is there, but cannot be listed.
    """
    if not folder.exists():
        return []
    found = [(parsed, path) for path in folder.iterdir() if (parsed := parse_name(path.name)) is not None]
    return [(step, path) for (step, _), path in sorted(found, reverse=True)]


def step_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step belongs."""
    return folder / step_name(step)


def trash_path(path: Path) -> Path:
    """Return the name that a checkpoint has while it is deleted."""
    return path.with_name(f"{_TRASH}{path.name}")


def is_leftover(name: str) -> bool:
    """Tell whether a name is of an unfinished checkpoint, or of one that was being deleted."""
    return any(
        name.startswith(prefix) and parse_name(name.removeprefix(prefix)) is not None
        for prefix in (_UNFINISHED, _TRASH)
    )
