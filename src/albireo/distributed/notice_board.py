"""Where each rank leaves a short text for all others, and reads theirs: files of one machine, or torch's store."""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from datetime import timedelta
from pathlib import Path
from typing import Any

__all__ = ["FileBoard", "NoticeBoard", "StoreBoard"]

_MAX_BYTES = 4096
_HEAD_BYTES = 8


class NoticeBoard(ABC):
    """A place for one text of each rank, the last one that it posted."""

    @abstractmethod
    def post(self, text: bytes) -> None:
        """Replace this rank's text.

        Raises:
            OSError: the place cannot be reached.
        """

    @abstractmethod
    def read(self) -> list[bytes | None]:
        """Return every rank's text, in rank order; None where there is none yet.

        Raises:
            OSError: the place cannot be reached.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of it; texts stay."""


class FileBoard(NoticeBoard):
    """Files in a folder that all ranks see, one each, written in place.

    Args:
        folder: it is there.
        rank: this rank.
        world_size: how many ranks there are.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self._paths = [folder / f"sign-{number}" for number in range(world_size)]
        self._own = os.open(self._paths[rank], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._files: dict[int, int] = {}
        self._last: list[bytes | None] = [None] * world_size

    def post(self, text: bytes) -> None:
        """See the base class."""
        if len(text) > _MAX_BYTES - _HEAD_BYTES:
            raise ValueError(f"a notice has at most {_MAX_BYTES - _HEAD_BYTES} bytes, not {len(text)}")
        head = len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
        os.pwrite(self._own, head + text, 0)

    def read(self) -> list[bytes | None]:
        """See the base class."""
        for number, path in enumerate(self._paths):
            if number not in self._files:
                try:
                    self._files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
            data = os.pread(self._files[number], _MAX_BYTES, 0)
            text = data[_HEAD_BYTES : _HEAD_BYTES + int.from_bytes(data[:4], "little")]
            # Read while it was written, it is read again at the next time.
            if text and zlib.crc32(text) == int.from_bytes(data[4:_HEAD_BYTES], "little"):
                self._last[number] = text
        return list(self._last)

    def close(self) -> None:
        """See the base class."""
        for file in (self._own, *self._files.values()):
            os.close(file)
        self._files.clear()


class StoreBoard(NoticeBoard):
    """Keys of the store over which ranks have found each other.

    Args:
        store: torch's; it is cloned, since a call that waits in it would make all others wait.
        rank: this rank.
        world_size: how many ranks there are.
        timeout_seconds: when a call is given up.
    """

    def __init__(self, store: Any, rank: int, world_size: int, *, timeout_seconds: float = 5.0) -> None:
        self._store = store.clone()
        self._store.set_timeout(timedelta(seconds=timeout_seconds))
        self._own = f"albireo/sign/{rank}"
        self._keys = [f"albireo/sign/{number}" for number in range(world_size)]
        self._complete = False

    def post(self, text: bytes) -> None:
        """See the base class."""
        try:
            self._store.set(self._own, text)
        except RuntimeError as error:  # of which torch's errors of stores and networks are kinds
            raise OSError(f"the ranks' store does not answer: {error}") from error

    def read(self) -> list[bytes | None]:
        """See the base class."""
        try:
            if not self._complete:
                # A key that is not there would be waited for.
                known = [self._store.check([key]) for key in self._keys]
                self._complete = all(known)
                return [self._store.get(key) if there else None for key, there in zip(self._keys, known, strict=True)]
            return list(self._store.multi_get(self._keys))
        except RuntimeError as error:
            raise OSError(f"the ranks' store does not answer: {error}") from error

    def close(self) -> None:
        """See the base class."""
        self._store = None
