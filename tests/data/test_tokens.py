from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from albireo.data.tokens import TokenStream, TokenWriter, token_dtype
from albireo.errors import DataError


def write(path: Path, ids: list[int], vocab_size: int) -> TokenStream:
    with TokenWriter(path, token_dtype(vocab_size)) as writer:
        for first in range(0, len(ids), 3):
            writer.append(np.array(ids[first : first + 3], dtype=np.int64))
    return TokenStream(path)


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(4096, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**32, "uint32")]
)
def test_the_smallest_type_is_used_and_the_largest_id_fits(tmp_path: Path, vocab_size: int, name: str) -> None:
    ids = [0, 5, vocab_size - 1, 1]
    stream = write(tmp_path / "a.safetensors", ids, vocab_size)
    assert stream.ids.dtype == np.dtype(name)
    assert stream[:].tolist() == ids
    assert stream[1:3].tolist() == ids[1:3]
    assert len(stream) == 4


def test_the_file_is_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", list(range(1000)), 4096)
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        assert list(file.keys()) == ["tokens"]
        assert file.get_tensor("tokens").tolist() == list(range(1000))
        assert file.get_slice("tokens")[10:12].tolist() == [10, 11]


def test_the_ids_are_mapped_and_cannot_be_written(tmp_path: Path) -> None:
    stream = write(tmp_path / "a.safetensors", [1, 2, 3], 4096)
    assert isinstance(stream.ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        stream[:][0] = 7


def test_a_copy_for_another_process_maps_the_file_again(tmp_path: Path) -> None:
    stream = write(tmp_path / "a.safetensors", [1, 2, 3], 4096)
    assert stream.__reduce__() == (TokenStream, (tmp_path / "a.safetensors",))
    assert isinstance(copy.deepcopy(stream).ids, np.memmap)


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for ids in ([65536], [-1]):
        with pytest.raises(DataError, match=r"a token id outside 0\.\.65535"):
            write(tmp_path / "a.safetensors", ids, 4096)
        with pytest.raises(DataError):  # and what was begun is no stream
            TokenStream(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "which does not agree with its 100 tokens"),
        (lambda data: data + b"x", "which does not agree"),
        (lambda data: data[:256], "which does not agree"),
        (lambda data: data[:40], "is not a safetensors file of token ids"),
        (lambda _: b"", "is not a safetensors file"),
        (lambda _: b"\xff" * 300, "is not a safetensors file"),
        (lambda data: data.replace(b'"U16"', b'"F16"'), "is not a safetensors file"),
        (lambda data: data.replace(b'"tokens"', b'"others"'), "is not a safetensors file"),
        (lambda data: data.replace(b"[100]", b"[10,]"), "is not a safetensors file"),
        (lambda data: data.replace(b"[100]", b"[ 99]"), "which does not agree with its 99 tokens"),
    ],
)
def test_a_file_that_is_damaged_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "a.safetensors"
    write(path, list(range(100)), 4096)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        TokenStream(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        TokenStream(tmp_path / "gone.safetensors")
