"""A text file, a file of JSON records, or a folder of them, as a source of text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from albireo.data.readers import is_json, read_lines, read_records, reading
from albireo.data.split_names import assign_splits
from albireo.data.text_source import TextSource
from albireo.errors import DataError

__all__ = ["FileSource", "open_files", "walk"]

_SNIFFED_BYTES = 8192


class FileSource(TextSource):
    """Text out of local files.

    Args:
        name: what the user called it.
        files: the files of each split, in the order in which they are read.
        text_field: the field of JSON records that holds the text.
        left_aside: files that belong to the source by place but are not read.

    Raises:
        DataError: there are no files, or the files of a split are all empty.
    """

    def __init__(
        self,
        name: str,
        files: Mapping[str, tuple[Path, ...]],
        text_field: str = "text",
        left_aside: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.splits = tuple(split for split in ("train", "validation") if files.get(split))
        self._files = {split: files[split] for split in self.splits}
        self._text_field = text_field
        self._left_aside = left_aside
        self._fingerprint: str | None = None
        self._stamps: dict[Path, tuple[int, int]] = {}
        if "train" not in self._files:
            raise DataError(f"{name} has no text files to train on")
        for split, paths in self._files.items():
            if not any(_size_bytes(path) for path in paths):
                raise DataError(f"the {split} data of {name} is empty (0 bytes); give a file with text in it")

    def fingerprint(self) -> str:
        """Return the SHA-256 of every file's bytes and of how they are read; reads all files once."""
        if self._fingerprint is None:
            self._stamps = {path: _stamp(path) for paths in self._files.values() for path in paths}
            digests = {
                split: [["json", self._text_field, _digest(p)] if is_json(p) else ["lines", _digest(p)] for p in paths]
                for split, paths in self._files.items()
            }
            self._fingerprint = hashlib.sha256(json.dumps(["files", 1, digests]).encode()).hexdigest()
        return self._fingerprint

    def describe(self) -> str:
        """Return one line for the user, with what was left aside."""
        counts = [f"{split} {_files(len(paths))}, {self._megabytes(split)}" for split, paths in self._files.items()]
        line = f"{self.name}: " + "; ".join(counts)
        if self._left_aside:
            shown = ", ".join(self._left_aside[:4]) + (", ..." if len(self._left_aside) > 4 else "")
            line += f"; left aside: {shown} ({_files(len(self._left_aside))})"
        return line

    def size_bytes(self, split: str) -> int | None:
        """Return the bytes of the files of a split; None where they hold more than the text."""
        paths = self._files[split]
        return None if any(is_json(path) for path in paths) else sum(_size_bytes(path) for path in paths)

    def _megabytes(self, split: str) -> str:
        return f"{sum(_size_bytes(path) for path in self._files[split]) / 2**20:.2f} MB"

    def _read(self, split: str) -> Iterator[str]:
        for path in self._files[split]:
            yield from read_records(path, self._text_field) if is_json(path) else read_lines(path)
            # Tokens are stored under the fingerprint: of a file that grew meanwhile, the wrong ones would be found.
            if path in self._stamps and _stamp(path) != self._stamps[path]:
                raise DataError(f"{path} was changed while it was being read; start again when it is complete")


def open_files(path: Path, name: str, text_field: str = "text") -> FileSource:
    """Open a text file, a file of JSON records (.json, .jsonl, .ndjson), or a folder of such files.

    A folder is read through, in sorted order, its subfolders too; hidden files are skipped, and files that are not text
    are left aside. Names such as `wiki.train.raw`, `wiki.valid.raw` and `wiki.test.raw` tell the splits.

    Args:
        path: a file or a folder that exists.
        name: what the user called it.
        text_field: the field of JSON records that holds the text.

    Raises:
        DataError: there is nothing to read, or it cannot be read.
    """
    if path.is_file():
        return FileSource(name, {"train": (path,)}, text_field)
    if not path.is_dir():
        raise DataError(f"{name} is neither a file nor a folder")
    found = {file.relative_to(path).as_posix(): file for file in walk(path)}
    text = {relative: file for relative, file in found.items() if is_json(file) or _looks_like_text(file)}
    if not text:
        beside = f" ({len(found)} files there are not text)" if found else ""
        raise DataError(f"the folder {name} holds no text files{beside}; give a folder with .txt or .jsonl files")
    plan = assign_splits(text)
    files = {
        "train": tuple(text[relative] for relative in plan.train),
        "validation": tuple(text[relative] for relative in plan.validation),
    }
    not_text = tuple(relative for relative in found if relative not in text)
    return FileSource(name, files, text_field, plan.left_aside + not_text)


def walk(folder: Path) -> list[Path]:
    """Return all files under a folder that are not hidden, in the order of their relative names.

    Args:
        folder: the folder; its subfolders count too.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:  # a link may lead back to a folder above it
            found += [Path(place, name) for name in names if not name.startswith(".")]
        seen.add(real)
    # A link to nowhere stays in, so that opening it says so; pipes and devices would never end.
    files = (path for path in found if path.is_file() or not path.exists())
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _looks_like_text(path: Path) -> bool:
    """Whether a file may be text: no text holds a zero byte. What is no valid UTF-8 is an error later, not skipped."""
    with reading(path) as file:
        return b"\0" not in file.read(_SNIFFED_BYTES)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with reading(path) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def _size_bytes(path: Path) -> int:
    return _stamp(path)[0]


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"
