"""Saving a checkpoint: all ranks write, rank 0 makes it whole, and nothing older is lost on the way."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from albireo.checkpoint.documents import JSON, decode_document, encode_document
from albireo.checkpoint.housekeeping import prune, settle, sweep
from albireo.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Listing,
    listing_name,
    merge_listings,
    tensor_file_name,
)
from albireo.checkpoint.names import again_path, checkpoint_path, step_path, unfinished_path
from albireo.checkpoint.ranks import Ranks
from albireo.checkpoint.reading import open_regular, read_exactly, stamp_of
from albireo.checkpoint.slices import TensorInfo, TensorSlice, into_shards
from albireo.checkpoint.tensor_file import write_tensor_file
from albireo.errors import CheckpointError, ConfigError
from albireo.files import FileOperations
from albireo.log import Log

__all__ = ["Snapshot", "save_checkpoint"]

_HINTS = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EACCES: "make the folder writable or choose another",
    errno.EPERM: "make the folder writable or choose another",
    errno.EROFS: "choose a folder on a disk that can be written",
}


@dataclass(frozen=True)
class Snapshot:
    """What one rank gives to a checkpoint.

    Attributes:
        step: how many optimizer steps were done; the same on all ranks.
        slices: this rank's. Over all ranks, each element of each tensor must come exactly once. They are asked for
            one after another while files are written, so a generator keeps no more than one file's worth alive; it
            must not wait for other ranks, which may have failed.
        state: this rank's own, such as its random states.
        shared_state: what is the same for all ranks; rank 0's is saved.
        aliases: second names of tensors, such as tied weights have, to the names of their slices; rank 0's are saved.
    """

    step: int
    slices: Iterable[TensorSlice]
    state: Mapping[str, JSON] = field(default_factory=dict)
    shared_state: Mapping[str, JSON] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


class _NotedError(CheckpointError):
    """Another rank failed, and has said why."""


def save_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    *,
    ranks: Ranks,
    keep: int,
    files: FileOperations | None = None,
    log: Log | None = None,
    shard_bytes: int = 2 * 2**30,
) -> Path:
    """Save a checkpoint, so that whenever this is cut off, an older checkpoint or this one is there whole.

    A collective call: every rank calls it, and it passes four barriers on every rank, also where it fails, so that no
    rank waits for one that gave up. It succeeds on all ranks or raises on all.

    Args:
        folder: of the run's checkpoints; the same on all ranks and on a filesystem that all see. Made if missing. Only
            one run may write there at a time.
        snapshot: what this rank saves. A checkpoint of the same step is replaced.
        ranks: who saves.
        keep: how many whole checkpoints stay, this one included; at least 1. Those of later steps are deleted.
        files: what touches the disk.
        log: hears of checkpoints that could not be deleted, which makes no save fail.
        shard_bytes: the most bytes of elements in one file.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: `keep` or `shard_bytes` is below 1, or the step below 0.
        CheckpointError: this rank or another could not write, or the slices do not make up whole tensors.
    """
    save = _Save(Path(folder), snapshot, ranks, files if files is not None else FileOperations(), shard_bytes)
    turns = _Turns(ranks)
    try:
        if keep < 1 or shard_bytes < 1 or snapshot.step < 0:
            raise ConfigError(  # noqa: TRY301  a rank that raised before the barriers would leave the others in them
                f"a save needs keep and shard_bytes of at least 1 and a step of at least 0, not {keep}, {shard_bytes} "
                f"and {snapshot.step}"
            )
        if ranks.rank == 0:
            save.begin()
        turns.wait()
        save.write_own_files()
        turns.wait()
        if ranks.rank == 0:
            save.commit()
            _keep_house(save, keep, log)
        turns.wait()
        save.check_committed()
        turns.wait()
    except Exception as error:
        save.note_failure(error)
        turns.pass_the_rest()
        if ranks.rank == 0 and not turns.is_broken:
            save.free_space()
        if isinstance(error, OSError | CheckpointError):
            raise CheckpointError(
                f"the checkpoint of step {snapshot.step} was not saved, and the older ones stay: {save.explain(error)}"
            ) from error
        raise
    return checkpoint_path(save.folder, snapshot.step)


class _Turns:
    """The four barriers of a save: the folder is there, all have written, the outcome is to be seen, all have seen it.

    Without the last, rank 0 could clear the outcome away, or begin the next save, before a slow rank has looked.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._left = 4
        self.is_broken = False

    def wait(self) -> None:
        self._left -= 1
        try:
            self._ranks.barrier()
        except BaseException:
            self._left, self.is_broken = 0, True  # a barrier that broke is no place to wait in again
            raise

    def pass_the_rest(self) -> None:
        while self._left:
            self.wait()


class _Save:
    """One rank's part in one save."""

    def __init__(self, folder: Path, snapshot: Snapshot, ranks: Ranks, files: FileOperations, shard_bytes: int) -> None:
        self.folder = folder
        self._snapshot = snapshot
        self._rank = ranks.rank
        self._world_size = ranks.world_size
        self._files = files
        self._shard_bytes = shard_bytes
        self._unfinished = unfinished_path(folder, snapshot.step)

    def begin(self) -> None:
        """Make an empty folder to write in."""
        self._files.make_directory(self.folder)
        sweep(self.folder, self._files)
        self._files.make_directory(self._unfinished)

    def write_own_files(self) -> None:
        """Write this rank's tensors, then its listing."""
        self._raise_noted()
        if not self._unfinished.is_dir():
            raise _NotedError("rank 0 could not begin; it says why")
        tensors: dict[str, TensorInfo] = {}
        records = [
            write_tensor_file(self._unfinished / tensor_file_name(self._rank, number), shard, self._files)
            for number, shard in enumerate(into_shards(self._declared(tensors), self._shard_bytes), start=1)
        ]
        listing = Listing(
            step=self._snapshot.step,
            rank=self._rank,
            world_size=self._world_size,
            tensors=tensors,
            files=tuple(records),
            state=self._snapshot.state,
        )
        self._files.write_bytes(self._unfinished / listing_name(self._rank), encode_document(listing.to_json()))
        self._files.sync_directory(self._unfinished)

    def commit(self) -> None:
        """Check what all ranks wrote, write the manifest, and give the folder its name."""
        self._raise_noted()
        listings, records = [], []
        for rank in range(self._world_size):
            listing, record = self._read_listing(rank)
            listings.append(listing)
            records.append(record)
        manifest = merge_listings(listings, records, self._snapshot.shared_state, self._snapshot.aliases)
        for record in manifest.files:
            size_bytes = (self._unfinished / record.name).lstat().st_size
            if size_bytes != record.size_bytes:
                raise CheckpointError(f"{record.name} has {size_bytes} bytes, but {record.size_bytes} were written")
        self._files.write_bytes(self._unfinished / MANIFEST_NAME, encode_document(manifest.to_json()))
        self._files.sync_directory(self._unfinished)
        target = step_path(self.folder, self._snapshot.step)
        if target.exists():
            target = again_path(self.folder, self._snapshot.step)
        self._files.rename(self._unfinished, target)
        try:
            self._files.sync_directory(self.folder)
        except OSError:
            # It may not outlast a power cut, so it does not count; and the other ranks learn that from the old name.
            self._files.rename(target, self._unfinished)
            raise

    def settle(self) -> None:
        """Let the new checkpoint take the name of an older one of the same step."""
        if again_path(self.folder, self._snapshot.step).exists():
            settle(self.folder, self._snapshot.step, self._files)

    def prune(self, keep: int) -> None:
        """Delete what is beyond `keep`."""
        prune(self.folder, self._snapshot.step, keep, self._files)

    def check_committed(self) -> None:
        """Raise if rank 0 could not finish: the unfinished folder is there for as long as the checkpoint is not."""
        if self._unfinished.exists():
            self._raise_noted()
            raise _NotedError("rank 0 could not finish; it says why")

    def note_failure(self, error: Exception) -> None:
        """Leave a note for the other ranks, if that is possible: they learn of the failure without it, but not why."""
        if isinstance(error, _NotedError):
            return
        with contextlib.suppress(OSError):
            self._files.write_bytes(self._note_path(self._rank), self.explain(error)[:500].encode())

    def free_space(self) -> None:
        """Remove what was written in vain: it may be what filled the disk. What stays, the next save removes."""
        with contextlib.suppress(OSError):
            if self._unfinished.exists():
                self._files.remove_tree(self._unfinished)

    def explain(self, error: Exception) -> str:
        """Return one line on what went wrong, and what to do where the system says no."""
        if not isinstance(error, OSError):
            return " ".join(str(error).split())
        hint = _HINTS.get(error.errno or 0)
        return f"{error.strerror or error}: {error.filename or self._unfinished}" + (f"; {hint}" if hint else "")

    def _note_path(self, rank: int) -> Path:
        return self._unfinished / f"rank-{rank:05d}.failed"

    def _raise_noted(self) -> None:
        for rank in range(self._world_size):
            path = self._note_path(rank)
            if path.exists():
                raise _NotedError(f"rank {rank} failed: {path.read_text(errors='replace')}")

    def _declared(self, tensors: dict[str, TensorInfo]) -> Iterator[TensorSlice]:
        """Pass slices on and enter their tensors, those without any elements too."""
        for slice_ in self._snapshot.slices:
            info = tensors.setdefault(slice_.name, slice_.info)
            if info != slice_.info:
                raise CheckpointError(f"slices of {slice_.name} are of different tensors: {info} and {slice_.info}")
            yield slice_

    def _read_listing(self, rank: int) -> tuple[Listing, FileRecord]:
        name = listing_name(rank)
        with open_regular(self._unfinished / name) as file:
            data = bytearray(stamp_of(file).size_bytes)
            read_exactly(file, memoryview(data), name)
        record = FileRecord(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        return Listing.from_json(decode_document(bytes(data), name)), record


def _keep_house(save: _Save, keep: int, log: Log | None) -> None:
    """Tidy up after the new checkpoint is safe; what cannot be deleted now is tried again at the next save."""
    try:
        save.settle()
        save.prune(keep)
    except OSError as error:
        if log is not None:
            log.warn(f"older checkpoints in {save.folder} could not be deleted: {error.strerror or error}")
