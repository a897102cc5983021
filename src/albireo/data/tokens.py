"""A text as one flat stream of token ids, in a safetensors file that is mapped into memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from albireo.errors import DataError

__all__ = ["TokenStream", "TokenWriter", "token_dtype"]

_TENSOR = "tokens"
_HEADER_BYTES = 256  # its length field included; fixed, because the count is known only when all is written
_NAMES: tuple[tuple[str, np.dtype[Any]], ...] = (("U16", np.dtype("<u2")), ("U32", np.dtype("<u4")))


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest type that holds every id of a vocabulary: uint16 up to 65,536 entries, else uint32."""
    return _NAMES[0][1] if vocab_size <= 2**16 else _NAMES[1][1]


class TokenStream:
    """Token ids, read from a mapped file: as many as the disk holds, in no more memory than what is looked at.

    Args:
        path: a safetensors file with one tensor, `tokens`, of one dimension, uint16 or uint32.

    Attributes:
        path: as above.
        ids: all ids, read-only, [tokens].

    Raises:
        DataError: the file cannot be read, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        dtype, count, offset_bytes = _read_header(path)
        self.path = path
        try:
            self.ids: NDArray[Any] = np.memmap(path, dtype=dtype, mode="r", offset=offset_bytes, shape=(count,))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be mapped into memory: {error}") from error

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def __getitem__(self, part: slice) -> NDArray[Any]:
        return np.asarray(self.ids[part])

    def __reduce__(self) -> tuple[type[TokenStream], tuple[Path]]:
        # A worker process maps the file again; a memory map would travel as a copy of all tokens.
        return (TokenStream, (self.path,))


class TokenWriter:
    """Writes a stream of tokens piece by piece; a context manager.

    Args:
        path: the file to write.
        dtype: uint16 or uint32.

    Attributes:
        count: tokens written so far.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.count = 0
        self._dtype = dtype
        self._file = path.open("wb")
        self._file.write(b"\0" * _HEADER_BYTES)

    def append(self, ids: NDArray[np.int64]) -> None:
        """Add ids, [any number].

        Raises:
            DataError: an id does not fit the type.
        """
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) > np.iinfo(self._dtype).max):
            raise DataError(
                f"a token id outside 0..{np.iinfo(self._dtype).max} came: {int(ids.min())}..{int(ids.max())}"
            )
        self._file.write(ids.astype(self._dtype).tobytes())
        self.count += len(ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.seek(0)
                self._file.write(_header(self._dtype, self.count))
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _header(dtype: np.dtype[Any], count: int) -> bytes:
    name = next(name for name, known in _NAMES if known == dtype)
    facts = {_TENSOR: {"dtype": name, "shape": [count], "data_offsets": [0, count * dtype.itemsize]}}
    text = json.dumps(facts).encode().ljust(_HEADER_BYTES - 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """Return the type, the count and the offset of the ids; sizes are checked against the file's."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            facts = json.loads(file.read(min(length, 2**20)))[_TENSOR]
        dtype = dict(_NAMES)[facts["dtype"]]
        (count,) = facts["shape"]
        begin, end = facts["data_offsets"]
        file_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a safetensors file of token ids") from error
    if count < 1 or end - begin != count * dtype.itemsize or file_bytes != 8 + length + end:
        raise DataError(f"{path} has {file_bytes} bytes, which does not agree with its {count} tokens")
    return dtype, count, 8 + length + begin
