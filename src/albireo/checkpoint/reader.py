"""Reading a checkpoint: everything is checked before anything is believed."""

from __future__ import annotations

import io
import os
import stat
from bisect import bisect_right
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from albireo.checkpoint.documents import MAX_DOCUMENT_BYTES, NewerFormatError, decode_document
from albireo.checkpoint.manifest import MANIFEST_NAME, FileRecord, Listing, Manifest, listing_name
from albireo.checkpoint.names import parse_name
from albireo.checkpoint.reading import (
    Stamp,
    check_size,
    hash_file,
    open_regular,
    read_exactly,
    read_recorded,
    stamp_of,
)
from albireo.checkpoint.slices import TensorInfo
from albireo.checkpoint.tensor_file import encode_header, view_bytes
from albireo.errors import CheckpointError

__all__ = ["Checkpoint", "open_checkpoint"]

_MAX_THREADS = 8
_STAGING_BYTES = 32 * 2**20


@dataclass(frozen=True)
class _Location:
    """Where the elements `start` to `stop` of a tensor lie."""

    start: int
    stop: int
    file: str
    offset_bytes: int


class Checkpoint:
    """A checkpoint that was found whole. Made by `open_checkpoint`.

    Every name may also be an alias. Threads may read at the same time.
    """

    def __init__(self, path: Path, manifest: Manifest, stamps: Mapping[str, Stamp]) -> None:
        self.path = path
        self._manifest = manifest
        self._stamps = stamps
        self._records = {record.name: record for record in manifest.files}
        self._locations = _locate(manifest)

    @property
    def step(self) -> int:
        """How many optimizer steps were done."""
        return self._manifest.step

    @property
    def world_size(self) -> int:
        """How many ranks saved it."""
        return self._manifest.world_size

    @property
    def shared_state(self) -> Mapping[str, Any]:
        """The JSON that rank 0 gave for all."""
        return self._manifest.shared_state

    @property
    def aliases(self) -> Mapping[str, str]:
        """Second names of tensors to the names they are saved under."""
        return self._manifest.aliases

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """Return the JSON that a rank gave for itself, or None if no such rank saved.

        Raises:
            CheckpointError: its file is damaged.
        """
        if not 0 <= rank < self.world_size:
            return None
        try:
            return dict(_read_listing(self.path, self._records[listing_name(rank)], self._manifest, rank).state)
        except CheckpointError as error:
            raise _damaged(self.path, error) from error

    def names(self, prefix: str = "") -> list[str]:
        """Return all names that can be read and begin with `prefix`, aliases among them, sorted."""
        return sorted(name for name in {*self._manifest.tensors, *self.aliases} if name.startswith(prefix))

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor.

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        return self._manifest.tensors[self._resolve(name)]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read a range of a tensor's elements, and no byte beyond it.

        Args:
            name: of the tensor.
            start: the first element, in the tensor flattened in row-major order.
            stop: one past the last, or None for the end.

        Returns:
            A new 1-D tensor in host memory, of the dtype that was saved.

        Raises:
            CheckpointError: there is no such tensor or range, or a file has changed since it was checked.
        """
        info = self.info(name)
        stop = info.elements if stop is None else stop
        self._check_range(name, info, start, stop)
        flat = torch.empty(stop - start, dtype=info.dtype)
        self._fill(self._resolve(name), start, flat)
        return flat

    def read_into(self, name: str, tensor: torch.Tensor, *, allow_cast: bool = False) -> None:
        """Fill a tensor with all elements of a saved one.

        Args:
            name: of the saved tensor.
            tensor: of the same shape, on any device. One in host memory is read into without a copy; another costs a
                buffer of 32 MB, or of its own size if it is not contiguous.
            allow_cast: let the tensor's dtype differ from the saved one, whatever is lost.

        Raises:
            CheckpointError: shape or dtype differ, there is no such tensor, or a file has changed since it was checked.
        """
        info = self.info(name)
        if tuple(tensor.shape) != info.shape:
            raise CheckpointError(
                f"{name} has shape {info.shape} in the checkpoint {self.path}, but {tuple(tensor.shape)} is to be "
                "filled: it belongs to another model"
            )
        tensor = tensor.detach()
        if tensor.is_contiguous():
            self.read_range_into(name, 0, tensor.view(-1), allow_cast=allow_cast)
            return
        self._check_target(name, info, tensor, allow_cast=allow_cast)
        tensor.copy_(self.read(name).view(info.shape))

    def read_range_into(self, name: str, start: int, flat: torch.Tensor, *, allow_cast: bool = False) -> None:
        """Fill a 1-D tensor, such as a shard of a flat buffer, with the elements from `start` on.

        Args:
            name: of the saved tensor.
            start: the first element, in the saved tensor flattened in row-major order.
            flat: 1-D, on any device; its length says how many elements are read.
            allow_cast: see `read_into`.

        Raises:
            CheckpointError: the range is not within the tensor, or see `read_into`.
        """
        info = self.info(name)
        if flat.ndim != 1:
            raise CheckpointError(f"a range of {name} is read into a 1-D tensor, not one of shape {tuple(flat.shape)}")
        self._check_range(name, info, start, start + flat.numel())
        self._check_target(name, info, flat, allow_cast=allow_cast)
        name, flat = self._resolve(name), flat.detach()
        if flat.device.type == "cpu" and flat.is_contiguous() and flat.dtype == info.dtype:
            self._fill(name, start, flat)
            return
        step = max(1, _STAGING_BYTES // info.dtype.itemsize)
        buffer = torch.empty(min(step, flat.numel()), dtype=info.dtype)
        for first in range(0, flat.numel(), step):
            part = flat[first : first + step]
            staged = buffer[: part.numel()]
            self._fill(name, start + first, staged)
            part.copy_(staged)

    def read_slice_into(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Fill a 1-D tensor with the elements from `start` on; numbers of floating point are cast to its dtype.

        As `read_range_into`, but for the cast.

        Raises:
            CheckpointError: see `read_range_into`.
        """
        floats = tensor.is_floating_point() and self.info(name).dtype.is_floating_point
        self.read_range_into(name, start, tensor, allow_cast=floats)

    def _resolve(self, name: str) -> str:
        saved = self.aliases.get(name, name)
        if saved not in self._manifest.tensors:
            raise CheckpointError(f"the checkpoint {self.path} holds no tensor {name}")
        return saved

    def _check_range(self, name: str, info: TensorInfo, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= info.elements:
            raise CheckpointError(f"{name} has {info.elements} elements, so {start} to {stop} is no range of them")

    def _check_target(self, name: str, info: TensorInfo, tensor: torch.Tensor, *, allow_cast: bool) -> None:
        if tensor.is_meta:
            raise CheckpointError(f"{name} cannot be read into a tensor on the meta device, which holds no elements")
        if tensor.dtype != info.dtype and not allow_cast:
            raise CheckpointError(
                f"{name} is {info.dtype} in the checkpoint {self.path}, but a tensor of {tensor.dtype} is to be "
                "filled; a cast must be allowed on purpose"
            )

    def _fill(self, name: str, start: int, flat: torch.Tensor) -> None:
        """Read elements from `start` on into contiguous host memory of the saved dtype."""
        locations = self._locations[name]
        stop, itemsize = start + flat.numel(), flat.element_size()
        index = bisect_right(locations, start, key=lambda location: location.start) - 1
        done = start
        while done < stop:
            location = locations[index]
            end = min(stop, location.stop)
            view = view_bytes(flat[done - start : end - start])
            self._read_bytes(location.file, location.offset_bytes + (done - location.start) * itemsize, view)
            done, index = end, index + 1

    def _read_bytes(self, file_name: str, offset_bytes: int, view: memoryview) -> None:
        try:
            with open_regular(self.path / file_name) as file:
                if stamp_of(file) != self._stamps[file_name]:
                    raise CheckpointError(f"{file_name} has changed since it was checked")  # noqa: TRY301
                file.seek(offset_bytes)
                read_exactly(file, view, file_name)
        except CheckpointError as error:
            raise _damaged(self.path, error) from error


def open_checkpoint(path: Path, *, check_contents: bool = True) -> Checkpoint:
    """Check a checkpoint and open it.

    Checked are the manifest against its own checksum, that what it lists is whole, and that every file has the size,
    the header and the SHA-256 that the manifest gives. Files are hashed in up to 8 threads.

    Args:
        path: the folder of one checkpoint, such as `checkpoints/step-00000060`.
        check_contents: False leaves out the SHA-256 of tensor files, for ranks that open what another rank has just
            checked. Torn and altered elements are not found then; short files, and all damage to JSON, still are.

    Raises:
        NewerFormatError: a newer version of the package wrote it.
        CheckpointError: naming the file that is missing or damaged, and how.
    """
    path = Path(path)
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise CheckpointError(f"there is no checkpoint at {path}: {error.strerror or error}") from error
    if not stat.S_ISDIR(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "not a folder"
        raise CheckpointError(f"there is no checkpoint at {path}: it is {what}; give a checkpoint's folder itself")
    try:
        manifest = _read_manifest(path)
        check = partial(_check_file, path, manifest, check_contents=check_contents)
        threads = max(1, min(_MAX_THREADS, os.cpu_count() or 1, len(manifest.files)))
        with ThreadPoolExecutor(threads, "checkpoint-check") as pool:
            stamps = list(pool.map(check, manifest.files))
    except NewerFormatError as error:
        raise NewerFormatError(f"the checkpoint {path} cannot be read: {error}") from error
    except CheckpointError as error:
        raise _damaged(path, error) from error
    return Checkpoint(
        path, manifest, {record.name: stamp for record, stamp in zip(manifest.files, stamps, strict=True)}
    )


def _damaged(path: Path, error: CheckpointError) -> CheckpointError:
    return CheckpointError(f"the checkpoint {path} is damaged: {error}")


def _read_manifest(path: Path) -> Manifest:
    with open_regular(path / MANIFEST_NAME) as file:
        size_bytes = stamp_of(file).size_bytes
        if size_bytes > MAX_DOCUMENT_BYTES:
            raise CheckpointError(f"{MANIFEST_NAME} has {size_bytes} bytes, more than any manifest")
        data = bytearray(size_bytes)
        read_exactly(file, memoryview(data), MANIFEST_NAME)
    manifest = Manifest.from_json(decode_document(bytes(data), MANIFEST_NAME))
    parsed = parse_name(path.name)
    if parsed is not None and parsed[0] != manifest.step:
        raise CheckpointError(f"{MANIFEST_NAME} is of step {manifest.step}, which the folder's name is not")
    return manifest


def _check_file(path: Path, manifest: Manifest, record: FileRecord, *, check_contents: bool) -> Stamp:
    if record.name.endswith(".json"):
        rank = int(record.name.removesuffix(".json").removeprefix("rank-"))
        _read_listing(path, record, manifest, rank)
    with open_regular(path / record.name) as file:
        stamp = stamp_of(file)
        check_size(file, record)
        if record.pieces:
            _check_header(file, manifest, record)
            if check_contents:
                file.seek(0)
                if hash_file(file) != record.sha256:
                    raise CheckpointError(
                        f"{record.name} was altered: its content does not have the checksum that was written"
                    )
    return stamp


def _check_header(file: io.FileIO, manifest: Manifest, record: FileRecord) -> None:
    header = encode_header(manifest.tensors, record.pieces)
    data_bytes = sum((p.stop - p.start) * manifest.tensors[p.name].dtype.itemsize for p in record.pieces)
    if len(header) + data_bytes != record.size_bytes:
        raise CheckpointError(
            f"{record.name} has {record.size_bytes} bytes, but its slices need {len(header) + data_bytes}"
        )
    found = bytearray(len(header))
    read_exactly(file, memoryview(found), record.name)
    if found != header:
        raise CheckpointError(f"{record.name} was altered: its header does not list the slices that the manifest lists")


def _read_listing(path: Path, record: FileRecord, manifest: Manifest, rank: int) -> Listing:
    if record.size_bytes > MAX_DOCUMENT_BYTES:
        raise CheckpointError(f"{record.name} has {record.size_bytes} bytes, more than any rank's state")
    listing = Listing.from_json(decode_document(read_recorded(path, record), record.name))
    if (listing.rank, listing.step, listing.world_size) != (rank, manifest.step, manifest.world_size):
        raise CheckpointError(f"{record.name} is of another checkpoint or rank")
    return listing


def _locate(manifest: Manifest) -> dict[str, list[_Location]]:
    locations: dict[str, list[_Location]] = {name: [] for name in manifest.tensors}
    for record in manifest.files:
        if not record.pieces:
            continue
        offset_bytes = len(encode_header(manifest.tensors, record.pieces))
        for piece in record.pieces:
            locations[piece.name].append(_Location(piece.start, piece.stop, record.name, offset_bytes))
            offset_bytes += (piece.stop - piece.start) * manifest.tensors[piece.name].dtype.itemsize
    for found in locations.values():
        found.sort(key=lambda location: location.start)
    return locations
