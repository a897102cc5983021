"""fp32 numbers in two halves of 16 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from albireo.optim.split_weights import join, split

words = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64)


def halves(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, rest = torch.empty_like(wide, dtype=torch.bfloat16), torch.empty_like(wide, dtype=torch.int16)
    split(wide, weight, rest)
    joined = torch.full_like(wide, 7.0)
    join(weight, rest, joined)
    return weight, rest, joined


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32).long()


@given(words)
def test_any_number_comes_back_within_a_unit_in_the_last_place(numbers: list[int]) -> None:
    wide = torch.tensor(numbers, dtype=torch.int32).view(torch.float32)
    weight, _, joined = halves(wide)
    none = wide.isnan()
    assert torch.equal(joined.isnan(), none)
    assert torch.equal(weight.isnan(), none)
    assert torch.equal(weight[~none], wide[~none].to(torch.bfloat16))
    assert ((bits(joined) - bits(wide))[~none].abs() <= 1).all()
    # Only what lies half a step up from an even neighbour moves, and towards zero.
    moved = (joined != wide) & ~none
    assert torch.equal(moved, (bits(wide) & 0x1FFFF == 0x8000) & ~none)
    assert (joined[moved].abs() < wide[moved].abs()).all()


@given(words)
def test_what_was_joined_is_split_into_the_same_halves(numbers: list[int]) -> None:
    first = halves(torch.tensor(numbers, dtype=torch.int32).view(torch.float32))
    second = halves(first[2])
    none = first[2].isnan()
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before[~none], after[~none])


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 3.4028234e38, 1e-45, -1e-40, float("inf"), float("-inf")])
def test_the_ends_of_the_range_are_exact(value: float) -> None:
    wide = torch.tensor([value])
    assert torch.equal(bits(halves(wide)[2]), bits(wide))


def test_halves_may_be_parts_of_longer_buffers() -> None:
    wide = torch.randn(200)
    weight, rest, joined = torch.zeros(300, dtype=torch.bfloat16), torch.zeros(300, dtype=torch.int16), torch.zeros(300)
    split(wide, weight[64:264], rest[64:264])
    join(weight, rest, joined)
    assert torch.allclose(joined[64:264], wide, rtol=2**-23, atol=0)
    assert joined[:64].count_nonzero() == 0
    assert joined[264:].count_nonzero() == 0
