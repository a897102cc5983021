"""Changes to the disk that must survive a crash, an operation a call, so that a test can stop at each of them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["FileOperations", "NewFile"]

# From <linux/fs.h> and <fcntl.h>; Python has no name for either.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100

_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


class NewFile:
    """A file that is being written from its beginning. Made by `FileOperations.new_file`."""

    def __init__(self, descriptor: int, path: Path, files: FileOperations) -> None:
        self._descriptor = descriptor
        self._path = path
        self._files = files

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`.

        Raises:
            OSError: the disk is full or broken; part of `data` may have been written.
        """
        view = memoryview(data)
        while view.nbytes:
            self._files.about_to("write", self._path)
            # The system may take less than it is given; what it took is counted and the rest is given again.
            view = view[os.write(self._descriptor, view[: self._files.chunk_bytes]) :]

    def sync(self) -> None:
        """Return when the content is on the disk, where a power cut cannot reach it."""
        self._files.about_to("sync", self._path)
        os.fsync(self._descriptor)


class FileOperations:
    """Changes to the disk. Every error is the system's own `OSError`; callers say what it means.

    A test overrides `about_to` to stop the process, or to raise, before the operation of its choice.

    Args:
        chunk_bytes: the most that one write hands to the system, and the size of buffers for what must be staged.
    """

    def __init__(self, chunk_bytes: int = 32 * 2**20) -> None:
        self.chunk_bytes = chunk_bytes

    def about_to(self, operation: str, path: Path) -> None:
        """Do nothing; called just before each operation with its name and the path that it changes."""

    @contextmanager
    def new_file(self, path: Path) -> Iterator[NewFile]:
        """Write a file from its beginning; it is synced when the block ends well. What was there is overwritten.

        Raises:
            OSError: the file cannot be made, `path` is a symbolic link, or the content cannot be synced.
        """
        self.about_to("create", path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            file = NewFile(descriptor, path, self)
            yield file
            file.sync()
        finally:
            os.close(descriptor)

    def write_bytes(self, path: Path, data: bytes) -> None:
        """Write a file and sync it; what was there is overwritten."""
        with self.new_file(path) as file:
            file.write(data)

    def replace(self, path: Path, data: bytes) -> None:
        """Write a file so that a reader, or a crash at any moment, finds the old one or the new one, never a part.

        Args:
            path: the file to make or replace; its folder must exist.
            data: the whole content.
        """
        # One fixed name for the unfinished file: what a killed writer left is overwritten by the next, not piled up.
        unfinished = path.with_name(f".{path.name}.tmp")
        self.write_bytes(unfinished, data)
        self.rename(unfinished, path)
        self.sync_directory(path.parent)

    def make_directory(self, path: Path) -> None:
        """Make a folder and the parents that are missing, each synced into its own parent; an existing one is fine."""
        if path.is_dir():
            return
        if path.parent != path:
            self.make_directory(path.parent)
        self.about_to("make directory", path)
        try:
            path.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error
        self.sync_directory(path.parent)

    def sync_directory(self, path: Path) -> None:
        """Return when the names in a folder are on the disk: new files, renames and removals."""
        self.about_to("sync directory", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network filesystems sync names by themselves and refuse the call.
            if error.errno not in _NOT_SUPPORTED:
                raise
        finally:
            os.close(descriptor)

    def sync_tree(self, path: Path) -> None:
        """Sync every file and folder below `path`, and `path` itself; for what others wrote there."""
        for entry in sorted(path.iterdir()):
            if entry.is_symlink():
                continue
            if entry.is_dir():
                self.sync_tree(entry)
            elif entry.is_file():
                self.about_to("sync", entry)
                descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        self.sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the name `target` in one step; a file of that name is replaced, a full folder refused."""
        self.about_to("rename", target)
        source.rename(target)

    def exchange(self, first: Path, second: Path) -> bool:
        """Swap the names of two files or folders in one step.

        Returns:
            False, with nothing changed, where the system or the filesystem cannot do that.
        """
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is None:  # not Linux, or a C library older than glibc 2.28
            return False
        self.about_to("exchange", second)
        if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
            return True
        code = ctypes.get_errno()
        if code in _NOT_SUPPORTED:
            return False
        raise OSError(code, os.strerror(code), str(second))

    def remove_file(self, path: Path) -> None:
        """Remove a file, or a symbolic link and not what it points at."""
        self.about_to("remove file", path)
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and all in it, a file at a time; symbolic links in it are removed, never followed."""
        if path.is_symlink() or not path.is_dir():
            self.remove_file(path)
            return
        for entry in sorted(path.iterdir()):
            self.remove_tree(entry)
        self.about_to("remove directory", path)
        path.rmdir()
