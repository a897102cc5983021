"""Writing named tensors as safetensors: one file, or several under an index, as Hugging Face has them.

Whenever this is cut off, what is to be read is the old tensors or the new ones, whole. A file is written under another
name and renamed. In a folder, the index is what counts: new files get names that no file has, the index is replaced in
one step, and only then the old files go. Whatever else lies in the folder stays.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from albireo.checkpoint.slices import TensorSlice
from albireo.checkpoint.tensor_file import ReadElements, write_tensor_file
from albireo.errors import CheckpointError
from albireo.files import FileOperations

__all__ = ["write_file", "write_saved_tensors", "write_sharded_tensors"]

_TEMPORARY = ".tmp-"


def write_file(path: Path, data: bytes, files: FileOperations) -> None:
    """Write or replace a file all at once.

    Args:
        path: the file; its folder is made if missing.
        data: its content.
        files: what touches the disk.

    Raises:
        CheckpointError: `path` is a folder, or the disk is full or cannot be written; an old file stays.
    """
    with _replacing(path, files) as temporary:
        files.write_bytes(temporary, data)


def write_saved_tensors(
    path: Path,
    slices: Sequence[TensorSlice],
    files: FileOperations,
    *,
    metadata: Mapping[str, str] | None = None,
    read: ReadElements | None = None,
) -> None:
    """Write whole tensors to one safetensors file, all at once.

    Args:
        path: the file; its folder is made if missing.
        slices: whole tensors.
        files: what touches the disk.
        metadata: texts for the file's header.
        read: where the elements of slices on the meta device come from.

    Raises:
        CheckpointError: see `write_file`, or a slice is no whole tensor.
    """
    _check_whole(slices)
    with _replacing(path, files) as temporary:
        write_tensor_file(temporary, slices, files, metadata=metadata, read=read)


def write_sharded_tensors(
    folder: Path,
    stem: str,
    slices: Sequence[TensorSlice],
    shard_bytes: int,
    files: FileOperations,
    *,
    metadata: Mapping[str, str] | None = None,
    companions: Mapping[str, bytes] | None = None,
    read: ReadElements | None = None,
) -> None:
    """Write whole tensors to several safetensors files with an index, all at once.

    Args:
        folder: made if missing.
        stem: the files' name: `STEM-00001-of-00002.safetensors` and `STEM.safetensors.index.json`.
        slices: whole tensors.
        shard_bytes: the most bytes of elements in a file; a tensor that is larger has a file of its own.
        files: what touches the disk.
        metadata: texts for the header of every file.
        companions: small files that go along, such as `config.json`: name to content.
        read: where the elements of slices on the meta device come from.

    Raises:
        CheckpointError: `folder` is a file, the disk is full or cannot be written (what was there stays), or a slice
            is no whole tensor.
    """
    _check_whole(slices)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, and several files are to be written: give a folder, or shard=False")
    shards = _deal(slices, shard_bytes)
    with _explained(folder):
        files.make_directory(folder)
        paths = _fresh_names(folder, stem, len(shards))
        try:
            for path, shard in zip(paths, shards, strict=True):
                write_tensor_file(path, shard, files, metadata=metadata, read=read)
            files.sync_directory(folder)
        except BaseException:
            _remove_quietly(paths, files)  # they may be what filled the disk
            raise
        for name, data in (companions or {}).items():
            write_file(folder / name, data, files)
        sizes = [slice_.data.numel() * slice_.data.element_size() for slice_ in slices]
        # Without any tensor, such as an optimizer's states before its first step, there is a header to be found.
        empty = {} if slices else {"files": [path.name for path in paths]}
        index = {
            "metadata": {"total_size": sum(sizes), **empty},
            "weight_map": {s.name: path.name for path, shard in zip(paths, shards, strict=True) for s in shard},
        }
        write_file(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2).encode(), files)
        for path in _outdated(folder, stem, {path.name for path in paths}):
            files.remove_file(path)
        files.sync_directory(folder)


def _check_whole(slices: Sequence[TensorSlice]) -> None:
    for slice_ in slices:
        if slice_.data.numel() != slice_.info.elements:
            raise CheckpointError(f"{slice_.name} is to be written whole, but came in parts")


def _deal(slices: Sequence[TensorSlice], shard_bytes: int) -> list[list[TensorSlice]]:
    shards: list[list[TensorSlice]] = [[]]
    room_bytes = shard_bytes
    for slice_ in slices:
        size_bytes = slice_.data.numel() * slice_.data.element_size()
        if shards[-1] and size_bytes > room_bytes:
            shards.append([])
            room_bytes = shard_bytes
        shards[-1].append(slice_)
        room_bytes -= size_bytes
    return shards


def _fresh_names(folder: Path, stem: str, count: int) -> list[Path]:
    """Return names for files, none of which is taken."""
    for generation in itertools.count():
        middle = f"-v{generation}" if generation else ""
        paths = [folder / f"{stem}{middle}-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        if not any(path.exists() for path in paths):
            break
    return paths


def _outdated(folder: Path, stem: str, current: set[str]) -> list[Path]:
    """Return what earlier saves left, and one whole file, which transformers would prefer to the index."""
    ours = re.compile(rf"{re.escape(stem)}(-v\d+)?-\d{{5}}-of-\d{{5}}\.safetensors")
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name == f"{stem}.safetensors" or (ours.fullmatch(path.name) and path.name not in current)
    ]


@contextlib.contextmanager
def _replacing(path: Path, files: FileOperations) -> Iterator[Path]:
    """Give a name to write to, and then that file the name `path`."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, and one file is to be written: give a file's name, or shard=True")
    temporary = path.with_name(_TEMPORARY + path.name)
    with _explained(path):
        files.make_directory(path.parent)
        try:
            yield temporary
            files.rename(temporary, path)
        except BaseException:
            _remove_quietly([temporary], files)
            raise
        files.sync_directory(path.parent)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written: {error.strerror or error}; what was there stays"
        ) from error


def _remove_quietly(paths: Sequence[Path], files: FileOperations) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            files.remove_file(path)
