"""Files of weights, written whole or not at all: at every operation that touches the disk."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from albireo.checkpoint import (
    TensorSlice,
    open_saved_tensors,
    whole,
    write_file,
    write_saved_tensors,
    write_sharded_tensors,
)
from albireo.errors import CheckpointError
from albireo.files import FileOperations


class _Stopped(BaseException):
    pass


class Stopping(FileOperations):
    """Fails before the operation of a number, or stops the process as it were."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.left = at
        self.error = error

    def about_to(self, operation: str, path: Path) -> None:
        if self.left == 0:
            # A full disk lets files be removed; a process that is gone removes none.
            self.left = -1 if isinstance(self.error, OSError) else 0
            raise self.error
        if self.left > 0:
            self.left -= 1


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((256,), value) for name in "abc"} | {"empty": torch.zeros(0, 2)}


def slices(value: float) -> list[TensorSlice]:
    return [whole(name, tensor) for name, tensor in tensors(value).items()]


def write_one(folder: Path, value: float, files: FileOperations) -> None:
    write_saved_tensors(folder / "model.safetensors", slices(value), files)


def write_many(folder: Path, value: float, files: FileOperations) -> None:
    config = {"config.json": b"{}"}
    write_sharded_tensors(folder, "model", slices(value), 2048, files, companions=config)


def value_in(folder: Path) -> float | None:
    """The one value of all tensors, or None if there is nothing to be read."""
    if not any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        return None
    with open_saved_tensors(folder, "model") as saved:
        assert saved.names() == ["a", "b", "c", "empty"]
        found = {float(value) for name in "abc" for value in saved.read(name)}
    assert len(found) == 1, "tensors of two saves"
    return found.pop()


def outcome(save: Callable[[], None]) -> str | None:
    """What a save raised; None if it ended."""
    try:
        save()
    except (_Stopped, CheckpointError) as raised:
        return str(raised)
    return None


@pytest.mark.parametrize("write", [write_one, write_many])
@pytest.mark.parametrize("error", [_Stopped(), OSError(errno.ENOSPC, "No space left on device")], ids=["kill", "full"])
@pytest.mark.parametrize("before", [None, 1.0])
def test_a_save_that_is_cut_off_leaves_the_old_or_the_new(
    tmp_path: Path, write: object, error: BaseException, before: float | None
) -> None:
    stopped = 0
    for at in range(1000):
        folder = tmp_path / str(at) / "deep"
        if before is not None:
            write(folder, before, FileOperations())  # type: ignore[operator]
            (folder / "notes.txt").write_text("mine")
        said = outcome(lambda: write(folder, 2.0, Stopping(at, error)))  # type: ignore[operator]  # noqa: B023
        if said is None:
            break
        stopped += 1
        assert value_in(folder) in (before, 2.0)
        if isinstance(error, OSError):
            assert "No space left on device; what was there stays" in said
            assert not list(folder.glob(".tmp-*"))
        write(folder, 3.0, FileOperations())  # type: ignore[operator]
        assert value_in(folder) == 3.0
        assert before is None or (folder / "notes.txt").read_text() == "mine"
        assert len(list(folder.glob("*.safetensors"))) == (1 if write is write_one else 2)
        assert not list(folder.glob(".tmp-*"))
    assert stopped > 5
    assert value_in(folder) == 2.0


def test_files_are_those_of_hugging_face(tmp_path: Path) -> None:
    write_sharded_tensors(tmp_path, "model", slices(1.0), 2048, FileOperations(), metadata={"note": "x"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["metadata"]["total_size"] == 3 * 1024
    assert sorted(set(index["weight_map"].values())) == names
    together = {key: tensor for name in names for key, tensor in load_file(tmp_path / name).items()}
    assert {key: index["weight_map"][key] for key in together} == index["weight_map"]
    assert all(torch.equal(together[key], tensor) for key, tensor in tensors(1.0).items())
    assert together["empty"].shape == (0, 2)
    # A tensor that is larger than a file may be has one of its own.
    write_sharded_tensors(tmp_path / "small", "model", slices(1.0), 10, FileOperations())
    assert len(list((tmp_path / "small").glob("*.safetensors"))) == 4


def test_a_folder_holds_model_and_optimizer_and_whatever_else(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-old.safetensors").write_text("not ours")
    (tmp_path / "model.safetensors").write_text("transformers would prefer it")
    for _ in range(3):
        for stem in ("model", "optimizer"):
            write_sharded_tensors(tmp_path, stem, slices(1.0), 2048, FileOperations())
    names = {path.name for path in tmp_path.iterdir()}
    assert {"tokenizer.json", "model-old.safetensors"} < names
    assert "model.safetensors" not in names
    assert len(names) == 2 + 2 * 3


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="or shard=True"):
        write_saved_tensors(tmp_path / "folder", slices(1.0), FileOperations())
    with pytest.raises(CheckpointError, match="or shard=False"):
        write_sharded_tensors(tmp_path / "file", "model", slices(1.0), 2048, FileOperations())
    write_file(tmp_path / "new" / "x.json", b"{}", FileOperations())
    assert (tmp_path / "new" / "x.json").read_bytes() == b"{}"


def test_parts_are_refused(tmp_path: Path) -> None:
    part = TensorSlice("a", (4,), 0, torch.zeros(2))
    with pytest.raises(CheckpointError, match="a is to be written whole"):
        write_saved_tensors(tmp_path / "x", [part], FileOperations())
    with pytest.raises(CheckpointError, match="a is to be written whole"):
        write_sharded_tensors(tmp_path / "x", "model", [part], 10, FileOperations())


def test_files_without_a_tensor_keep_their_texts(tmp_path: Path) -> None:
    write_sharded_tensors(tmp_path, "optimizer", [], 100, FileOperations(), metadata={"note": "x"})
    with open_saved_tensors(tmp_path, "optimizer") as saved:
        assert saved.names() == []
        assert saved.metadata["note"] == "x"


def test_elements_may_come_from_elsewhere(tmp_path: Path) -> None:
    """Of a tensor on the meta device, a buffer at a time is asked for."""
    numbers = torch.arange(1000.0)
    asked = []

    def read(slice_: TensorSlice, start: int, out: torch.Tensor) -> None:
        asked.append((slice_.name, start, out.numel()))
        out.copy_(numbers[start : start + out.numel()])

    files = FileOperations()
    files.chunk_bytes = 1600
    parts = [whole("far", torch.empty(10, 100, device="meta")), whole("near", torch.ones(3))]
    write_saved_tensors(tmp_path / "file", parts, files, read=read)
    assert asked == [("far", 0, 400), ("far", 400, 400), ("far", 800, 200)]
    loaded = load_file(tmp_path / "file")
    assert torch.equal(loaded["far"], numbers.view(10, 100))
    assert torch.equal(loaded["near"], torch.ones(3))
    with pytest.raises(CheckpointError, match="far is on the meta device"):
        write_saved_tensors(tmp_path / "other", parts, files)
