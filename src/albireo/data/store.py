"""Folders on disk that are built once, by whichever process comes first, and trusted only while they are whole.

An entry is a folder of files and of `entry.json`, which holds the size and the SHA-256 of each. It is built under
another name, under a lock, synced, and renamed; so a reader sees a whole entry or none. An entry that was shortened
or altered later is found out by its sizes and checksums, and built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from albireo.errors import DataError
from albireo.log import Log

__all__ = ["built_once", "default_cache_folder", "key_of"]

_MANIFEST = "entry.json"
_FORMAT = 1
_BLOCK_BYTES = 2**20


def default_cache_folder() -> Path:
    """Return where data is kept between runs: `$ALBIREO_CACHE`, or `albireo` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("ALBIREO_CACHE"):
        return Path(own).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification tells programs to ignore a relative path.
    return (caches if caches.is_absolute() else Path.home() / ".cache") / "albireo"


def key_of(*parts: str | int) -> str:
    """Return the SHA-256, in hexadecimal, of what decides an entry's content; the order of the parts counts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def built_once(folder: Path, kind: str, key: str, build: Callable[[Path], None], *, log: Log | None = None) -> Path:
    """Return the folder of an entry; build it first if it is not there or not whole.

    Any number of processes may ask at the same time: one builds, the others wait.

    Args:
        folder: the cache folder.
        kind: the subfolder of entries of this kind.
        key: what `key_of` made.
        build: writes the files of the entry into the folder it is given. If it raises, there is no entry.
        log: told when something is waited for or built again.

    Raises:
        DataError: the cache folder cannot be written.
    """
    entry = folder / kind / key
    if _fault(entry) is None:
        return entry
    with _refusing(folder):
        entry.parent.mkdir(parents=True, exist_ok=True)
    with _locked(entry.with_suffix(".lock"), folder, log):
        fault = _fault(entry)  # another process may have built it meanwhile
        if fault is None:
            return entry
        if fault and log is not None:
            log.warn(f"the cached {kind} in {entry} are damaged ({fault}); they are made again")
        partial = entry.with_suffix(".partial")
        with _refusing(folder):
            _remove(partial)  # of a process that was killed; the lock says that nobody writes there now
            partial.mkdir()
        try:
            with _refusing(folder):
                build(partial)  # a disk that is full is met here
                _seal(partial)
                _remove(entry)
                partial.rename(entry)
                _sync(entry.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return entry


def _fault(entry: Path) -> str | None:
    """What is wrong with an entry: None if it is whole, an empty text if there is none."""
    if not entry.exists():
        return ""
    try:
        manifest = json.loads((entry / _MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT or not manifest["files"]:
            return f"{_MANIFEST} is of another format"
        for name, facts in manifest["files"].items():
            file = entry / name
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}"
            if _digest(file) != facts["sha256"]:
                return f"the checksum of {name} differs"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _seal(partial: Path) -> None:
    """Sync the files of an entry and write down what they are; that comes last, so that it vouches for the rest."""
    files = {}
    for file in sorted(partial.iterdir()):
        _sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    manifest = partial / _MANIFEST
    manifest.write_text(json.dumps({"format": _FORMAT, "files": files}, indent=2) + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(partial)


def _remove(path: Path) -> None:
    """Remove whatever lies at a path, a file that somebody put in the way too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(path: Path, folder: Path, log: Log | None) -> Iterator[None]:
    lock = FileLock(path)
    with _refusing(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if log is not None:
                log.line(f"waiting for another process that prepares the same data ({path})")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Say of a cache folder that cannot be written what to do about it."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(
            f"the cache folder {folder} cannot be written ({reason}); "
            f"name another by --cache or the environment variable ALBIREO_CACHE"
        ) from error
