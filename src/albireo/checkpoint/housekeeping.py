"""The folder that checkpoints lie in: what crashed saves left there is removed, and only the newest checkpoints stay."""

from __future__ import annotations

from pathlib import Path

from albireo.checkpoint.names import again_path, find_checkpoints, is_leftover, step_path, trash_path
from albireo.checkpoint.reader import open_checkpoint
from albireo.errors import CheckpointError
from albireo.files import FileOperations

__all__ = ["prune", "settle", "sweep", "tidy"]


def tidy(folder: Path, files: FileOperations | None = None) -> None:
    """Clear away what a crashed save left in a folder of checkpoints; one that does not exist is tidy.

    To be called by one process, before a run goes on: it may never save again, and then nobody else would.

    Args:
        folder: of the checkpoints.
        files: what touches the disk.

    Raises:
        CheckpointError: something cannot be removed.
    """
    if not folder.is_dir():
        return
    try:
        sweep(folder, files if files is not None else FileOperations())
    except OSError as error:
        raise CheckpointError(
            f"what a crash left in {folder} cannot be removed: {error.strerror or error}: {error.filename}"
        ) from error


def sweep(folder: Path, files: FileOperations) -> None:
    """Remove what a crashed save left, and finish a replacement that it began.

    Raises:
        OSError: something cannot be removed.
    """
    for entry in sorted(folder.iterdir()):
        if is_leftover(entry.name):
            files.remove_tree(entry)
    for step, path in find_checkpoints(folder):
        if path == again_path(folder, step):
            settle(folder, step, files)


def settle(folder: Path, step: int, files: FileOperations) -> None:
    """Let a checkpoint that waits as `.again` take the place of the older one of its step.

    At every moment, and after a power cut at every moment, one of the two is there whole: each rename is on the disk
    before the next begins.

    Raises:
        OSError: a rename or the removal of the older one failed.
    """
    again, plain = again_path(folder, step), step_path(folder, step)
    trash = None
    if plain.exists():
        trash = _to_trash(plain, files)
    files.rename(again, plain)
    files.sync_directory(folder)
    if trash is not None:
        files.remove_tree(trash)


def prune(folder: Path, step: int, keep: int, files: FileOperations) -> None:
    """Delete checkpoints after one was saved, until `keep` are left.

    A damaged one does not count among those kept, or a keep of 2 could leave one that cannot be loaded for a reserve;
    only what its own manifest and the sizes of its files show is looked at. One of a later step than the one just saved
    is deleted: the run went on from before it, so it was damaged or is no longer this run's future.

    Args:
        folder: of the checkpoints.
        step: of the one just saved.
        keep: how many stay, that one included.
        files: what touches the disk.

    Raises:
        OSError: one could not be deleted.
    """
    sound = 0
    for other, path in find_checkpoints(folder):
        if other > step or sound >= keep:
            files.remove_tree(_to_trash(path, files))
        elif other == step or _looks_whole(path):
            sound += 1


def _looks_whole(path: Path) -> bool:
    try:
        open_checkpoint(path, check_contents=False)
    except CheckpointError:
        return False
    return True


def _to_trash(path: Path, files: FileOperations) -> Path:
    """Rename first: a checkpoint that is half deleted must not have a checkpoint's name."""
    trash = trash_path(path)
    files.rename(path, trash)
    files.sync_directory(path.parent)
    return trash
