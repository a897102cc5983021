"""Opening files that nobody vouches for."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from albireo.checkpoint.manifest import FileRecord
from albireo.errors import CheckpointError

__all__ = ["Stamp", "hash_file", "open_regular", "read_exactly", "read_recorded", "stamp_of"]

_CHUNK_BYTES = 4 * 2**20


class Stamp(NamedTuple):
    """What changes when a file is written or replaced."""

    inode: int
    size_bytes: int
    modified_ns: int


@contextmanager
def open_regular(path: Path) -> Iterator[io.FileIO]:
    """Open a file for reading, if it is one: no link, no pipe, no device.

    Raises:
        CheckpointError: it is missing, is not a regular file, or cannot be read, within the block too.
    """
    try:
        # Without O_NONBLOCK, a pipe of that name would hold the process for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{path.name} is not a regular file")
            with io.FileIO(descriptor, "r", closefd=False) as file:
                yield file
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} is missing") from error
    except OSError as error:
        if path.is_symlink():
            raise CheckpointError(f"{path.name} is a symbolic link, not a file") from error
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror or error}") from error


def stamp_of(file: io.FileIO) -> Stamp:
    """Return the stamp of an open file."""
    status = os.fstat(file.fileno())
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


def read_exactly(file: io.FileIO, view: memoryview, name: str) -> None:
    """Fill `view` from where `file` stands.

    Raises:
        CheckpointError: the file ends before.
        OSError: it cannot be read.
    """
    while view.nbytes:
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{name} ends {view.nbytes} bytes too early")
        view = view[count:]


def hash_file(file: io.FileIO) -> str:
    """Return the SHA-256, in hexadecimal, of what is left of a file."""
    digest = hashlib.sha256()
    view = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(view):
        digest.update(view[:count])
    return digest.hexdigest()


def check_size(file: io.FileIO, record: FileRecord) -> None:
    """Refuse a file that is shorter or longer than was recorded.

    Raises:
        CheckpointError: with both lengths.
    """
    size_bytes = stamp_of(file).size_bytes
    if size_bytes != record.size_bytes:
        raise CheckpointError(f"{record.name} has {size_bytes} bytes, but {record.size_bytes} were written")


def read_recorded(folder: Path, record: FileRecord) -> bytes:
    """Return a whole small file after its size and checksum were found right.

    Raises:
        CheckpointError: they are not, or it cannot be read.
    """
    with open_regular(folder / record.name) as file:
        check_size(file, record)
        data = bytearray(record.size_bytes)
        read_exactly(file, memoryview(data), record.name)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise CheckpointError(f"{record.name} was altered: its content does not have the checksum that was written")
    return bytes(data)
