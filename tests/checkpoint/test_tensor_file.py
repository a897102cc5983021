from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from albireo.checkpoint.slices import TensorSlice, whole
from albireo.checkpoint.tensor_file import write_tensor_file
from albireo.errors import CheckpointError
from albireo.files import FileOperations


def test_any_safetensors_reader_opens_the_file(tmp_path: Path, tiny: Callable[[int], dict[str, torch.Tensor]]) -> None:
    tensors = {name: tensor for name, tensor in tiny(3).items() if tensor.numel()}
    # The narrow ones first: elements must still lie at multiples of their width, for readers that map the file.
    slices = [whole(name, tensor) for name, tensor in sorted(tensors.items(), key=lambda i: i[1].element_size())]
    slices.append(TensorSlice("model/part", (10, 10), 37, torch.arange(5.0)))
    path = tmp_path / "x.safetensors"
    record = write_tensor_file(path, slices, FileOperations())
    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    assert header_bytes % 8 == 0
    for name, entry in json.loads(data[8 : 8 + header_bytes]).items():
        if name in tensors:
            assert entry["data_offsets"][0] % tensors[name].element_size() == 0
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    assert found.pop("model/part@37").tolist() == [0, 1, 2, 3, 4]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert record.size_bytes == path.stat().st_size
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(record.pieces) == sorted(slice_.piece for slice_ in slices)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 2**20])
def test_chunks_and_strides_do_not_change_the_file(tmp_path: Path, chunk_bytes: int) -> None:
    base = torch.arange(40.0)
    strided = TensorSlice("x", (20,), 0, base[::2])
    packed = TensorSlice("x", (20,), 0, base[::2].contiguous())
    one = write_tensor_file(tmp_path / "one", [strided], FileOperations(chunk_bytes))
    two = write_tensor_file(tmp_path / "two", [packed], FileOperations())
    assert one.sha256 == two.sha256
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_no_second_copy_of_host_tensors_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: made.append(args) or real(*args, **kwargs))
    write_tensor_file(tmp_path / "x", [whole("x", torch.zeros(1000))], FileOperations())
    assert made == []


def test_the_same_slice_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the slice of x from element 0 is given twice"):
        write_tensor_file(tmp_path / "x", [whole("x", torch.zeros(2)), whole("x", torch.ones(2))], FileOperations())
    assert not (tmp_path / "x").exists()
