"""Finding the checkpoint to go on from."""

from __future__ import annotations

from pathlib import Path

from albireo.checkpoint.documents import NewerFormatError
from albireo.checkpoint.names import find_checkpoints
from albireo.checkpoint.reader import Checkpoint, open_checkpoint
from albireo.errors import CheckpointError

__all__ = ["newest_whole"]


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole, all of its contents checked.

    Args:
        folder: of a run's checkpoints; one that does not exist holds none.

    Returns:
        The checkpoint, or None if there is none, and a line on each damaged one that was passed over on the way.

    Raises:
        NewerFormatError: the newest is of a later version of the format. Going on from an older one would throw work
            away that is not lost.
        CheckpointError: the folder cannot be listed.
    """
    passed_over: list[str] = []
    try:
        found = find_checkpoints(Path(folder))
    except OSError as error:
        raise CheckpointError(
            f"the folder of checkpoints {folder} cannot be listed: {error.strerror or error}"
        ) from error
    for _, path in found:
        try:
            return open_checkpoint(path), passed_over
        except NewerFormatError:
            raise
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over
