from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from albireo.checkpoint.slices import (
    DTYPE_CODES,
    Piece,
    TensorInfo,
    TensorSlice,
    check_coverage,
    into_shards,
    whole,
)
from albireo.errors import CheckpointError

INFO = TensorInfo((2, 5), torch.float32)


def test_whole_covers_any_shape() -> None:
    for shape in [(), (0,), (0, 4), (7,), (2, 3, 4)]:
        slice_ = whole("x", torch.ones(shape))
        assert slice_.info == TensorInfo(shape, torch.float32)
        assert (slice_.start, slice_.stop) == (0, slice_.info.elements)
        check_coverage({"x": slice_.info}, [slice_.piece] if slice_.data.numel() else [])


def test_whole_flattens_in_row_major_order_and_detaches() -> None:
    tensor = torch.arange(6.0, requires_grad=True).view(2, 3).t()
    slice_ = whole("x", tensor)
    assert slice_.data.tolist() == [0, 3, 1, 4, 2, 5]
    assert not slice_.data.requires_grad


@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_every_dtype_can_be_a_slice(dtype: torch.dtype) -> None:
    assert whole("x", torch.zeros(3, dtype=dtype)).dtype is dtype


def test_a_slice_refuses_what_cannot_be_saved() -> None:
    with pytest.raises(CheckpointError, match=r"x has dtype torch\.complex64, which cannot be saved"):
        whole("x", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(CheckpointError, match=r"must be 1-D, but has shape \(2, 2\)"):
        TensorSlice("x", (4,), 0, torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match=r"elements 3 to 5, but the tensor of shape \(2, 2\) has 4"):
        TensorSlice("x", (2, 2), 3, torch.zeros(2))
    with pytest.raises(CheckpointError, match="elements -1 to 1"):
        TensorSlice("x", (2, 2), -1, torch.zeros(2))


@pytest.mark.parametrize("name", ["", "a@3", "line\nbreak", "__metadata__", "x" * 2000, "\ud800"])
def test_a_slice_refuses_names_that_files_cannot_hold(name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot name a tensor"):
        whole(name, torch.zeros(1))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([], "elements 0 to 10 of 10 of x are missing"),
        ([(1, 10)], "elements 0 to 1 of 10 of x are missing"),
        ([(0, 4), (6, 10)], "elements 4 to 6 of 10 of x are missing"),
        ([(0, 9)], "elements 9 to 10 of 10 of x are missing"),
        ([(0, 6), (4, 10)], "elements 4 to 6 of 10 of x are given twice"),
        ([(0, 10), (0, 10)], "elements 0 to 10 of 10 of x are given twice"),
        ([(0, 10), (3, 5)], "elements 3 to 5 of 10 of x are given twice"),
        ([(0, 12)], "x has 10 elements, but its slices reach to 12"),
    ],
)
def test_coverage_names_the_range_that_is_wrong(bounds: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_coverage({"x": INFO}, [Piece("x", *bound) for bound in bounds])


def test_coverage_refuses_a_slice_of_an_unknown_tensor() -> None:
    with pytest.raises(CheckpointError, match="a slice of y"):
        check_coverage({"x": INFO}, [Piece("x", 0, 10), Piece("y", 0, 1)])


@given(
    pieces=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), max_size=6),
    elements=st.integers(0, 12),
)
def test_coverage_agrees_with_counting_each_element(pieces: list[tuple[int, int]], elements: int) -> None:
    found = [Piece("x", start, start + length) for start, length in pieces]
    counts = [sum(piece.start <= i < piece.stop for piece in found) for i in range(24)]
    right = all(count == (index < elements) for index, count in enumerate(counts))
    try:
        check_coverage({"x": TensorInfo((elements,), torch.int8)}, found)
    except CheckpointError:
        assert not right
    else:
        assert right


@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([torch.uint8, torch.float32])), max_size=8),
    shard_bytes=st.integers(1, 50),
)
def test_shards_hold_all_elements_in_order_and_no_more_than_fits(
    sizes: list[tuple[int, torch.dtype]], shard_bytes: int
) -> None:
    slices = [whole(f"t{i}", torch.arange(size).to(dtype)) for i, (size, dtype) in enumerate(sizes)]
    shards = list(into_shards(slices, shard_bytes))
    assert all(shards)
    for shard in shards:
        held_bytes = sum(part.data.numel() * part.data.element_size() for part in shard)
        assert held_bytes <= shard_bytes or (len(shard) == 1 and shard[0].data.numel() == 1)
    parts = [part for shard in shards for part in shard]
    check_coverage({slice_.name: slice_.info for slice_ in slices}, [part.piece for part in parts])
    for slice_ in slices:
        mine = [part.data for part in parts if part.name == slice_.name]
        assert torch.equal(torch.cat([*mine, slice_.data[:0]]), slice_.data)
        if slice_.data.numel() * slice_.data.element_size() <= shard_bytes:
            assert len(mine) <= 1, "a slice that fits into a file was cut"


def test_shards_ask_for_slices_only_as_they_are_needed() -> None:
    asked = []

    def slices():  # type: ignore[no-untyped-def]
        for number in range(10):
            asked.append(number)
            yield whole(f"t{number}", torch.zeros(4, dtype=torch.uint8))

    shards = into_shards(slices(), shard_bytes=8)
    assert asked == []
    assert [part.name for part in next(shards)] == ["t0", "t1"]
    assert asked == [0, 1, 2]
