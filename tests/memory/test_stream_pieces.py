"""Chunks cut into pieces: every element once, in order, within a slot, and nowhere but where a tensor may be cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.memory.stream_pieces import PIECE_STEP, SLOTS, pieces_of, ring_bytes, slot_elements
from albireo.sharding import FlatLayout

STEP = 64
shapes = st.lists(st.integers(1, 1000).map(lambda numel: (numel,)), min_size=1, max_size=8)


@given(shapes, st.integers(STEP, 700), st.data())
def test_pieces_have_each_element_once_and_fit(sizes: list[tuple[int]], most: int, data: st.DataObject) -> None:
    cuts = FlatLayout.of(sizes, 1).cuts(0)
    numbers = sorted(data.draw(st.sets(st.sampled_from(range(len(cuts))))))
    pieces = pieces_of(cuts, numbers, most, step=STEP)
    parts = [part for piece in pieces for part in piece.parts]
    for number in numbers:
        of_one = [part for part in parts if part.fragment == number]
        assert [part.begin for part in of_one] == [cuts[number].offset, *(part.stop for part in of_one[:-1])]
        assert of_one[-1].stop == cuts[number].offset + cuts[number].numel
        assert all((part.begin - cuts[number].offset) % STEP == 0 for part in of_one)
    assert [part.fragment for part in parts] == sorted(part.fragment for part in parts)
    assert {part.fragment for part in parts} == set(numbers)
    assert all(0 < piece.numel <= most and piece.begin < piece.stop for piece in pieces)


@given(shapes, st.integers(STEP, 700))
def test_pieces_are_as_large_as_a_slot_allows(sizes: list[tuple[int]], most: int) -> None:
    cuts = FlatLayout.of(sizes, 1).cuts(0)
    pieces = pieces_of(cuts, range(len(cuts)), most, step=STEP)
    for one, other in itertools.pairwise(pieces):
        first = other.parts[0]
        # Not even one step more of what comes next would have fitted.
        assert min(first.stop, first.begin + STEP) - one.begin > most or first.stop - first.begin < STEP


def test_a_slot_smaller_than_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller than 64"):
        pieces_of((), (), 63, step=64)


@given(st.integers(1, 2**31))
def test_a_ring_takes_what_its_slots_take(largest: int) -> None:
    assert PIECE_STEP <= slot_elements(largest) <= max(PIECE_STEP, largest)
    assert ring_bytes(largest) == SLOTS * 18 * slot_elements(largest) <= 0.5 * 2**30
