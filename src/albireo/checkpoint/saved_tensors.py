"""Reading named tensors from safetensors: one file, or the files of a folder under an index, as Hugging Face has them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from albireo.checkpoint.slices import DTYPE_CODES, TensorInfo
from albireo.errors import CheckpointError

__all__ = ["SavedTensors", "TensorSource", "open_saved_tensors", "refuse_pickle"]

_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
_STAGING_BYTES = 32 * 2**20
_PICKLED = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})


class TensorSource(Protocol):
    """Named tensors that can be read: a checkpoint, or files of weights."""

    @property
    def path(self) -> Path:
        """Where they are, for errors."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Second names of tensors to the names they are saved under."""

    def names(self, prefix: str = "") -> list[str]:
        """Return all names that begin with `prefix`, aliases among them."""

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor."""

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        """Fill a tensor of the same shape."""

    def read_slice_into(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Fill a 1-D tensor with the elements from `start` on of the saved one, flattened in row-major order.

        Numbers of floating point are cast to the tensor's dtype.
        """


def refuse_pickle(path: Path, suffix: str = ".safetensors") -> None:
    """Refuse a name that is one of a pickled file, by habit.

    Args:
        path: a file or folder.
        suffix: that of the name to give instead.

    Raises:
        CheckpointError: with the name to give.
    """
    if path.suffix in _PICKLED:
        raise CheckpointError(
            f"{path.name} is the name of a pickled file, which can run any code when it is read; nothing is saved or "
            f"loaded so: name it {path.stem}{suffix}"
        )


class SavedTensors:
    """Tensors in safetensors files. Made by `open_saved_tensors`.

    Attributes:
        metadata: the texts of the files' headers.
    """

    def __init__(self, path: Path, places: Mapping[str, tuple[Any, str]], metadata: Mapping[str, str]) -> None:
        self.metadata = metadata
        self._path = path
        self._places = places

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self._path

    @property
    def aliases(self) -> Mapping[str, str]:
        """None: a file has each name once."""
        return {}

    def names(self, prefix: str = "") -> list[str]:
        """Return all names that begin with `prefix`, sorted."""
        return sorted(name for name in self._places if name.startswith(prefix))

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def renamed(self, names: Mapping[str, str]) -> SavedTensors:
        """Return some of the tensors under other names.

        Args:
            names: new names to those here.
        """
        return SavedTensors(self._path, {new: self._places[old] for new, old in names.items()}, self.metadata)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor.

        Raises:
            CheckpointError: there is no tensor of that name, or its dtype is none of plain numbers.
        """
        if name not in self._places:
            raise CheckpointError(f"{self._path} holds no tensor {name}")
        file, key = self._places[name]
        part = file.get_slice(key)
        code = part.get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(f"{self._path} holds {key} as {code}, which cannot be loaded")
        return TensorInfo(tuple(part.get_shape()), _DTYPES[code])

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in host memory, as it was saved.

        Raises:
            CheckpointError: see `info`.
        """
        self.info(name)
        file, key = self._places[name]
        tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a tensor that `read_into` could not fill.

        Raises:
            CheckpointError: shapes differ, or dtypes other than of floating point do; or see `info`.
        """
        info = self.info(name)
        if tuple(tensor.shape) != info.shape:
            raise CheckpointError(
                f"{self._path} holds {name} of shape {info.shape}, but {tuple(tensor.shape)} is to be filled: it "
                "belongs to another model"
            )
        self._check_dtype(name, info, tensor)

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        """Fill a tensor; numbers of floating point are cast to its dtype.

        Raises:
            CheckpointError: see `check`.
        """
        self.check(name, tensor)
        tensor.detach().copy_(self.read(name))

    def read_slice_into(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Fill a 1-D tensor with a run of elements; numbers of floating point are cast to its dtype.

        Args:
            name: of the saved tensor.
            start: the first element, in the saved tensor flattened in row-major order.
            tensor: 1-D, on any device; its length says how many elements are read.

        Raises:
            CheckpointError: the run is not within the tensor; or see `check`.
        """
        info = self.info(name)
        stop = start + tensor.numel()
        if tensor.ndim != 1 or not 0 <= start <= stop <= info.elements:
            raise CheckpointError(
                f"{name} in {self._path} has {info.elements} elements, so {start} to {stop} cannot be read from it into "
                f"a tensor of shape {tuple(tensor.shape)}: give a 1-D tensor and a run within"
            )
        self._check_dtype(name, info, tensor)
        if tensor.numel() == 0:
            return
        if not info.shape:
            tensor.detach().copy_(self.read(name).view(1))
            return
        file, key = self._places[name]
        part = file.get_slice(key)
        # A file is sliced by rows, so as many rows are read at a time as fit into a small buffer.
        row = info.elements // info.shape[0]
        rows_at_once = max(1, _STAGING_BYTES // (row * info.dtype.itemsize))
        last = (stop - 1) // row + 1
        for first in range(start // row, last, rows_at_once):
            rows = part[first : min(first + rows_at_once, last)].reshape(-1)
            begin, end = max(start, first * row), min(stop, first * row + rows.numel())
            tensor.detach()[begin - start : end - start].copy_(rows[begin - first * row : end - first * row])

    def _check_dtype(self, name: str, info: TensorInfo, tensor: torch.Tensor) -> None:
        if tensor.dtype != info.dtype and not (tensor.is_floating_point() and info.dtype.is_floating_point):
            raise CheckpointError(f"{self._path} holds {name} as {info.dtype}, but {tensor.dtype} is to be filled")


@contextmanager
def open_saved_tensors(path: Path, stem: str) -> Iterator[SavedTensors]:
    """Open a file, a folder or an index of tensors.

    Args:
        path: a safetensors file, an index (`.json`), or a folder that holds one of them.
        stem: how they are called in a folder: `model` or `optimizer`.

    Raises:
        CheckpointError: there is nothing of the kind, or it is damaged.
    """
    with ExitStack() as stack:
        places: dict[str, tuple[Any, str]] = {}
        metadata: dict[str, str] = {}
        for file_path in _files(path, stem):
            file = stack.enter_context(_opened(file_path))
            metadata.update(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118  no mapping: it has no other way to list its names
                if key in places:
                    raise CheckpointError(f"{path} holds {key} twice: files of different saves lie together")
                places[key] = (file, key)
        yield SavedTensors(path, places, metadata)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or is damaged or cut short: {error}") from error


def _files(path: Path, stem: str) -> list[Path]:
    """Return the files that hold the tensors."""
    if path.is_dir():
        single, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
        if single.is_file():  # as transformers chooses
            return [single]
        if index.is_file():
            return _indexed(index)
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
        hint = f"; {pickled[0]} is pickled and is not read: convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{path} holds neither {single.name} nor {index.name}{hint}")
    refuse_pickle(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file and no folder {path}")
    return _indexed(path) if path.suffix == ".json" else [path]


def _indexed(index: Path) -> list[Path]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read as JSON: {error}") from error
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{index} has no weight_map of names and files")
    extra = content.get("metadata")
    empty = extra.get("files", []) if isinstance(extra, dict) and not files else []
    if not isinstance(empty, list) or not all(isinstance(name, str) for name in empty):
        raise CheckpointError(f"{index} has no names of files")
    names = sorted({*files.values(), *empty})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name!r}, which is no file beside it: the folder is not whole")
    return [index.parent / name for name in names]
