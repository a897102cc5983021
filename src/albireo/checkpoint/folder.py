"""Replacing a folder that others read by its name, such as an exported model, all at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from albireo.errors import CheckpointError
from albireo.files import FileOperations

__all__ = ["replace_folder", "settle_folder"]


def replace_folder(target: Path, write: Callable[[Path], None], files: FileOperations | None = None) -> None:
    """Write a folder under another name, sync all of it, and swap it in.

    Whenever this is cut off, `target` is the old folder or the new one, whole. Where the filesystem cannot swap two
    names in one step, `target` may be missing after a crash in the instant between two renames; the whole new folder
    then lies beside it, and `settle_folder` or the next call puts it in place.

    Args:
        target: the folder to make or replace; its parent is made if missing. One process writes it at a time.
        write: fills the empty folder that it is given.
        files: what touches the disk; `write` itself may use anything.

    Raises:
        CheckpointError: `target` is a file or a link, or the disk is full or cannot be written; an old folder stays.
    """
    target = Path(target)
    files = files if files is not None else FileOperations()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} is not a folder, so it cannot be replaced by one; remove it or choose another")
    unfinished, complete, trash = _names(target)
    try:
        files.make_directory(target.parent)
        _settle(target, files)
        files.make_directory(unfinished)
        try:
            write(unfinished)
        except BaseException:
            with contextlib.suppress(OSError):
                files.remove_tree(unfinished)  # it may be what filled the disk
            raise
        files.sync_tree(unfinished)
        if not target.exists():
            files.rename(unfinished, target)
        elif not files.exchange(unfinished, target):
            files.rename(unfinished, complete)
            files.sync_directory(target.parent)
            _put_in_place(target, files)
        files.sync_directory(target.parent)
        # The old folder has one of these names now. On the disk it must be out of the way before it is taken apart.
        _remove_if_there(unfinished, files)
        _remove_if_there(trash, files)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"the folder {target} could not be written: {reason}; what was there stays") from error


def settle_folder(target: Path, files: FileOperations | None = None) -> None:
    """Finish or undo what a crash in `replace_folder` left.

    Raises:
        CheckpointError: something cannot be renamed or removed.
    """
    try:
        _settle(Path(target), files if files is not None else FileOperations())
    except OSError as error:
        raise CheckpointError(f"what a crash left beside {target} could not be removed: {error}") from error


def _settle(target: Path, files: FileOperations) -> None:
    unfinished, complete, trash = _names(target)
    _remove_if_there(unfinished, files)
    _remove_if_there(trash, files)
    if complete.exists():
        _put_in_place(target, files)
        files.sync_directory(target.parent)
        _remove_if_there(trash, files)


def _put_in_place(target: Path, files: FileOperations) -> None:
    _, complete, trash = _names(target)
    if target.exists():
        files.rename(target, trash)
    files.rename(complete, target)


def _names(target: Path) -> tuple[Path, Path, Path]:
    """Return the names of the folder while it is written, when it is complete, and of the old one on its way out."""
    unfinished, complete, trash = (target.with_name(f".{word}-{target.name}") for word in ("tmp", "new", "trash"))
    return unfinished, complete, trash


def _remove_if_there(path: Path, files: FileOperations) -> None:
    if path.exists():
        files.remove_tree(path)
