"""The safetensors format, written as a stream.

The format is the one at https://huggingface.co/docs/safetensors: eight bytes with the header's length, the header in
JSON, the elements. It is written here, and not by the library, because the library wants all of a file's tensors in
host memory at once, and leaves the checksum to a second pass over the file. Any safetensors reader opens these files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from albireo.checkpoint.manifest import FileRecord
from albireo.checkpoint.slices import DTYPE_CODES, Piece, TensorInfo, TensorSlice
from albireo.errors import CheckpointError
from albireo.files import FileOperations

__all__ = ["ReadElements", "encode_header", "view_bytes", "write_tensor_file"]

ReadElements = Callable[[TensorSlice, int, torch.Tensor], None]
"""Fills a 1-D host tensor with a slice's elements from an index on."""

_ALIGNMENT_BYTES = 8


def encode_header(
    tensors: Mapping[str, TensorInfo], pieces: Sequence[Piece], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return all that stands before the elements in a file.

    A slice that is a whole tensor has the tensor's name and shape; a part of one is 1-D and named `NAME@START`.

    Args:
        tensors: at least those that `pieces` are of.
        pieces: in the order of their elements in the file.
        metadata: texts for the header beside the format.

    Raises:
        CheckpointError: two pieces begin at the same element of the same tensor.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end_bytes = 0
    for piece in pieces:
        info = tensors[piece.name]
        is_whole = piece.stop - piece.start == info.elements
        key = piece.name if is_whole else f"{piece.name}@{piece.start}"
        if key in entries:
            raise CheckpointError(f"the slice of {piece.name} from element {piece.start} is given twice")
        start_bytes, end_bytes = end_bytes, end_bytes + (piece.stop - piece.start) * info.dtype.itemsize
        entries[key] = {
            "dtype": DTYPE_CODES[info.dtype],
            "shape": list(info.shape) if is_whole else [piece.stop - piece.start],
            "data_offsets": [start_bytes, end_bytes],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    # Elements begin at a multiple of eight bytes, so that a reader may map them as they lie.
    header += b" " * (-len(header) % _ALIGNMENT_BYTES)
    return len(header).to_bytes(8, "little") + header


def write_tensor_file(
    path: Path,
    slices: Sequence[TensorSlice],
    files: FileOperations,
    *,
    metadata: Mapping[str, str] | None = None,
    read: ReadElements | None = None,
) -> FileRecord:
    """Write slices to a safetensors file and sync it.

    Elements in host memory are written from where they are; others pass through one buffer of `files.chunk_bytes`.

    Args:
        path: the file, which is made new.
        slices: parts of tensors with at least one element each, or whole tensors; they lie in the file with the widest
            dtypes first.
        files: what touches the disk.
        metadata: texts for the header beside the format.
        read: where the elements of slices on the meta device come from.

    Returns:
        What was written: its name, size, checksum and pieces.

    Raises:
        OSError: the file cannot be written.
        CheckpointError: the same slice is there twice.
    """
    # Each element then lies at a multiple of its own width, which readers that map the file need.
    ordered = sorted(slices, key=lambda slice_: -slice_.data.element_size())
    pieces = tuple(slice_.piece for slice_ in ordered)
    header = encode_header({slice_.name: slice_.info for slice_ in ordered}, pieces, metadata)
    digest = hashlib.sha256(header)
    size_bytes = len(header)
    # Hashing costs as long as writing does; a thread beside the write hides it.
    with files.new_file(path) as file, ThreadPoolExecutor(1, "checkpoint-sha256") as hasher:
        file.write(header)
        for slice_ in ordered:
            for chunk in _host_chunks(slice_, files.chunk_bytes, read):
                hashed = hasher.submit(digest.update, chunk)
                file.write(chunk)
                hashed.result()  # the next chunk may use the same buffer
                size_bytes += chunk.nbytes
    return FileRecord(name=path.name, size_bytes=size_bytes, sha256=digest.hexdigest(), pieces=pieces)


def view_bytes(flat: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous 1-D tensor in host memory, without a copy; writing to them changes the tensor."""
    return flat.view(torch.uint8).numpy().data


def _host_chunks(slice_: TensorSlice, chunk_bytes: int, read: ReadElements | None) -> Iterator[memoryview]:
    flat = slice_.data
    if flat.is_meta and read is None:
        raise CheckpointError(f"{slice_.name} is on the meta device, which holds no elements")
    step = max(1, chunk_bytes // flat.element_size())
    in_place = flat.device.type == "cpu" and flat.is_contiguous()
    buffer = flat if in_place else torch.empty(min(step, flat.numel()), dtype=flat.dtype)
    for first in range(0, flat.numel(), step):
        part = flat[first : first + step]
        if not in_place:
            staged = buffer[: part.numel()]
            if part.is_meta and read is not None:
                read(slice_, first, staged)
            else:
                staged.copy_(part)
            part = staged
        yield view_bytes(part)
