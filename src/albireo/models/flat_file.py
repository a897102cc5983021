"""One safetensors file, read by ranges of elements.

The library slices a tensor by rows alone, through a map of the file whose pages count as the process's memory. Whoever
fills a flat buffer wants any run of elements, read once, into memory that is there already.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from albireo.checkpoint.tensor_file import view_bytes
from albireo.errors import ModelError

__all__ = ["FlatFile"]

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
# What is read at a time where the bytes cannot go straight to their place.
_STAGING_BYTES = 8 * 2**20
_LENGTH_BYTES = 8


class _Run(NamedTuple):
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    numel: int
    offset_bytes: int


class FlatFile:
    """A safetensors file that is open for reading.

    Args:
        path: the file.

    Raises:
        ModelError: it cannot be read, or its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._damaged(error.strerror or error) from error
        try:
            self._runs = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def read_into(self, key: str, start: int, out: torch.Tensor) -> None:
        """Read the elements `[start, start + out.numel())` of a tensor, flattened in row-major order.

        Args:
            key: the tensor's name in the file.
            start: the first element.
            out: `[n]`, contiguous, of any dtype of floating point and on any device; numbers are cast to it.

        Raises:
            ModelError: the file does not hold them, or cannot be read.
        """
        run = self._runs.get(key)
        if run is None or not 0 <= start <= start + out.numel() <= run.numel:
            raise self._damaged(f"the elements from {start} to {start + out.numel()} of {key} are not in it")
        first_byte = run.offset_bytes + start * run.dtype.itemsize
        if out.dtype == run.dtype and out.device.type == "cpu":
            self._read(first_byte, view_bytes(out.detach()))
            return
        step = max(1, _STAGING_BYTES // run.dtype.itemsize)
        staged = torch.empty(min(step, out.numel()), dtype=run.dtype, device="cpu")
        for first in range(0, out.numel(), step):
            part = out[first : first + step]
            read = staged[: part.numel()]
            self._read(first_byte + first * run.dtype.itemsize, view_bytes(read))
            # 64 bits go through fp32, as if the model had been loaded and then cast.
            part.copy_(read.float() if run.dtype == torch.float64 else read)

    def _read(self, offset_bytes: int, view: memoryview) -> None:
        try:
            while view.nbytes:
                count = os.preadv(self._descriptor, [view], offset_bytes)
                if count == 0:
                    raise self._damaged(f"it ends {view.nbytes} bytes too early")
                view, offset_bytes = view[count:], offset_bytes + count
        except OSError as error:
            raise self._damaged(error.strerror or error) from error

    def _read_header(self) -> dict[str, _Run]:
        size_bytes = os.fstat(self._descriptor).st_size
        length = bytearray(_LENGTH_BYTES)
        self._read(0, memoryview(length))
        header_bytes = int.from_bytes(length, "little")
        data_start = _LENGTH_BYTES + header_bytes
        if data_start > size_bytes:
            raise self._damaged(f"its header would have {header_bytes} bytes, and the file has {size_bytes}")
        header = bytearray(header_bytes)
        self._read(_LENGTH_BYTES, memoryview(header))
        try:
            entries = json.loads(header)
            return {
                key: self._run(entry, data_start, size_bytes)
                for key, entry in entries.items()
                if key != "__metadata__" and entry["dtype"] in _DTYPES
            }
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise self._damaged(f"its header is not that of a safetensors file: {error}") from error

    def _run(self, entry: Mapping[str, Any], data_start: int, size_bytes: int) -> _Run:
        dtype, numel = _DTYPES[entry["dtype"]], math.prod(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != numel * dtype.itemsize or not 0 <= begin <= end <= size_bytes - data_start:
            raise ValueError(f"a tensor of {numel} elements cannot lie in the bytes from {begin} to {end}")
        return _Run(dtype, numel, data_start + begin)

    def _damaged(self, how: object) -> ModelError:
        return ModelError(f"{self._path} is damaged or cut short: {how}")
