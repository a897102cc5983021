"""Slices of tensors: what they are, whether they make up the whole, and how they are dealt to files. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from albireo.errors import CheckpointError

__all__ = [
    "DTYPE_CODES",
    "Piece",
    "TensorInfo",
    "TensorSlice",
    "check_coverage",
    "check_name",
    "check_supported",
    "into_shards",
    "whole",
]

MAX_ELEMENTS = 2**63 - 1
_MAX_NAME_LENGTH = 1024

# The dtypes that are saved, and their names in safetensors files.
DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorInfo(NamedTuple):
    """A whole tensor, without its elements.

    Attributes:
        shape: of the whole tensor; () for a scalar.
        dtype: of its elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many elements the whole tensor has."""
        return math.prod(self.shape)


class Piece(NamedTuple):
    """Elements `start` to `stop`, without `stop`, of a tensor that was flattened in row-major order."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class TensorSlice:
    """A run of elements of a named tensor, with the elements.

    Attributes:
        name: the whole tensor's, such as `model/model.decoder.layers.0.fc1.weight`.
        shape: the whole tensor's.
        start: the first element, in the whole tensor flattened in row-major order.
        data: the elements, 1-D, of the whole tensor's dtype, on any device. It is not copied before it is written.

    Raises:
        CheckpointError: `data` is not 1-D, reaches beyond the tensor, or has a dtype that is not saved.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor

    def __post_init__(self) -> None:
        check_name(self.name)
        check_supported(self.name, self.data.dtype)
        object.__setattr__(self, "data", self.data.detach())
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.data.ndim != 1:
            raise CheckpointError(f"a slice of {self.name} must be 1-D, but has shape {tuple(self.data.shape)}")
        if self.start < 0 or self.stop > self.info.elements:
            raise CheckpointError(
                f"a slice of {self.name} holds elements {self.start} to {self.stop}, but the tensor of shape "
                f"{self.shape} has {self.info.elements}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the whole tensor."""
        return self.data.dtype

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.data.numel()

    @property
    def info(self) -> TensorInfo:
        """The whole tensor that this is a part of."""
        return TensorInfo(self.shape, self.data.dtype)

    @property
    def piece(self) -> Piece:
        """Where the elements lie."""
        return Piece(self.name, self.start, self.stop)


def whole(name: str, tensor: torch.Tensor) -> TensorSlice:
    """Return the slice that is all of a tensor.

    Args:
        name: the tensor's name in the checkpoint.
        tensor: any shape and device; one that is not contiguous is copied on its device.
    """
    return TensorSlice(name=name, shape=tuple(tensor.shape), start=0, data=tensor.detach().reshape(-1))


def check_name(name: str) -> None:
    """Refuse a name that the files could not hold.

    `@` parts a name from the place of a slice within a safetensors file, and `__metadata__` has a meaning there.

    Raises:
        CheckpointError: the name is empty, too long, or holds `@` or a character that cannot be printed.
    """
    if not 0 < len(name) <= _MAX_NAME_LENGTH or "@" in name or not name.isprintable() or name == "__metadata__":
        raise CheckpointError(
            f"{name[:100]!r} cannot name a tensor in a checkpoint: a name has 1 to {_MAX_NAME_LENGTH} printable "
            "characters, no '@', and is not '__metadata__'"
        )


def check_supported(name: str, dtype: torch.dtype) -> None:
    """Refuse a dtype that is not saved.

    Raises:
        CheckpointError: with the dtypes that are.
    """
    if dtype not in DTYPE_CODES:
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPE_CODES)
        raise CheckpointError(f"{name} has dtype {dtype}, which cannot be saved; these can: {known}")


def check_coverage(tensors: Mapping[str, TensorInfo], pieces: Iterable[Piece]) -> None:
    """Check that pieces make up every tensor: each element once.

    Args:
        tensors: name to whole tensor.
        pieces: in any order.

    Raises:
        CheckpointError: naming the tensor and the first range that is missing or comes twice.
    """
    by_name: dict[str, list[Piece]] = {name: [] for name in tensors}
    for piece in pieces:
        if piece.name not in by_name:
            raise CheckpointError(f"there is a slice of {piece.name}, which no list of tensors names")
        by_name[piece.name].append(piece)
    for name, info in tensors.items():
        covered = 0
        for piece in sorted(by_name[name]):
            if piece.start > covered:
                raise CheckpointError(f"elements {covered} to {piece.start} of {info.elements} of {name} are missing")
            if piece.start < covered:
                stop = min(piece.stop, covered)
                raise CheckpointError(f"elements {piece.start} to {stop} of {info.elements} of {name} are given twice")
            covered = piece.stop
        if covered < info.elements:
            raise CheckpointError(f"elements {covered} to {info.elements} of {info.elements} of {name} are missing")
        if covered > info.elements:
            raise CheckpointError(f"{name} has {info.elements} elements, but its slices reach to {covered}")


def into_shards(slices: Iterable[TensorSlice], shard_bytes: int) -> Iterator[list[TensorSlice]]:
    """Deal slices to files, in their order.

    A slice is cut only if it is larger than a file may be. Slices without elements are left out. No more than one
    shard's slices are held at a time, so slices that are made while they are asked for never all exist.

    Args:
        slices: any number of them.
        shard_bytes: the most bytes of elements in a shard; a single element that is larger still gets its own.

    Yields:
        Lists of slices, none of them empty.
    """
    shard: list[TensorSlice] = []
    room_bytes = shard_bytes
    for slice_ in slices:
        for part in _cut(slice_, shard_bytes):
            part_bytes = part.data.numel() * part.data.element_size()
            if shard and part_bytes > room_bytes:
                yield shard
                shard, room_bytes = [], shard_bytes
            shard.append(part)
            room_bytes -= part_bytes
    if shard:
        yield shard


def _cut(slice_: TensorSlice, part_bytes: int) -> Iterator[TensorSlice]:
    count = slice_.data.numel()
    step = max(1, part_bytes // slice_.data.element_size())
    for first in range(0, count, step):
        part = slice_.data[first : first + step]
        yield TensorSlice(name=slice_.name, shape=slice_.shape, start=slice_.start + first, data=part)
