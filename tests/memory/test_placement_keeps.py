"""What is kept between uses: Belady's where he is right, the best where there are few, quick where there are many."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from placed_step import fetches_of_min, fewest_fetched_bytes

from albireo.memory.placement_keeps import Gap, choose_gaps


def gaps_of(uses: Sequence[int], sizes: Sequence[int]) -> list[Gap]:
    """Return the gaps of chunks used one at a time."""
    last: dict[int, int] = {}
    gaps = []
    for number, chunk in enumerate(uses):
        if number - last.get(chunk, number) > 1:
            gaps.append(Gap(chunk, last[chunk], number, sizes[chunk], sizes[chunk]))
        last[chunk] = number
    return gaps


def fetched(uses: Sequence[int], sizes: Sequence[int], kept: frozenset[Gap]) -> int:
    """Return the bytes fetched: at each first use, and after each gap that is not kept."""
    return sum(sizes[chunk] for chunk in set(uses)) + sum(
        gap.fetch_bytes for gap in gaps_of(uses, sizes) if gap not in kept
    )


def room_left(uses: Sequence[int], sizes: Sequence[int], kept: frozenset[Gap], room: Sequence[int]) -> int:
    """Return the least that is left at a time."""
    return min(
        limit - sizes[chunk] - sum(gap.size_bytes for gap in kept if gap.use < number < gap.next_use)
        for number, (chunk, limit) in enumerate(zip(uses, room, strict=True))
    )


USES = st.integers(1, 8).flatmap(lambda count: st.lists(st.integers(0, count - 1), min_size=1, max_size=40))


@given(USES, st.integers(1, 8))
def test_equal_chunks_in_constant_room_are_fetched_as_often_as_by_belady(uses: list[int], places: int) -> None:
    kept = choose_gaps(gaps_of(uses, [10] * 8), [10 * (places - 1)] * len(uses))
    assert fetched(uses, [10] * 8, kept) == 10 * fetches_of_min(uses, places)


@given(st.lists(st.integers(0, 24), min_size=1, max_size=150), st.integers(1, 25))
def test_so_are_many(uses: list[int], places: int) -> None:
    kept = choose_gaps(gaps_of(uses, [1] * 25), [places - 1] * len(uses))
    assert fetched(uses, [1] * 25, kept) == fetches_of_min(uses, places)


@given(USES, st.lists(st.integers(0, 100), min_size=8, max_size=8), st.data())
def test_up_to_eight_chunks_of_any_size_in_any_room_are_the_optimum(
    uses: list[int], sizes: list[int], data: st.DataObject
) -> None:
    room = [sizes[chunk] + data.draw(st.integers(0, sum(sizes))) for chunk in uses]
    kept = choose_gaps(gaps_of(uses, sizes), [limit - sizes[chunk] for chunk, limit in zip(uses, room, strict=True)])
    assert room_left(uses, sizes, kept, room) >= 0
    best = fewest_fetched_bytes([frozenset([chunk]) for chunk in uses], sizes, room)
    assert fetched(uses, sizes, kept) == best


@given(st.lists(st.integers(0, 19), min_size=1, max_size=120), st.integers(0, 2**32))
def test_many_chunks_of_any_size_stay_within_the_room(uses: list[int], seed: int) -> None:
    chance = random.Random(seed)
    sizes = [chance.randint(0, 100) for _ in range(20)]
    room = [sizes[chunk] + chance.randint(0, 1000) for chunk in uses]
    free = [limit - sizes[chunk] for chunk, limit in zip(uses, room, strict=True)]
    gaps = gaps_of(uses, sizes)
    kept = choose_gaps(gaps, free)
    assert kept <= set(gaps)
    assert room_left(uses, sizes, kept, room) >= 0
    for gap in set(gaps) - kept:  # nothing more would fit
        assert room_left(uses, sizes, kept | {gap}, room) < 0
    assert choose_gaps(gaps, free) == kept


@pytest.mark.parametrize("tightness", [0.25, 0.5, 0.75])
def test_what_does_not_all_fit_in_the_beam_is_near_the_optimum(tightness: float) -> None:
    # Ten to eleven chunks: more than are tried in all ways, and few enough to know the optimum.
    chance = random.Random(f"near {tightness}")
    for _ in range(4):
        count = chance.randint(9, 11)
        sizes = [chance.randint(10, 100) for _ in range(count)]
        uses = [chance.randrange(count) for _ in range(50)]
        room = [sizes[c] + int(sum(sizes) * tightness * chance.uniform(0.3, 1.2)) for c in uses]
        kept = choose_gaps(gaps_of(uses, sizes), [limit - sizes[c] for c, limit in zip(uses, room, strict=True)])
        best = fewest_fetched_bytes([frozenset([chunk]) for chunk in uses], sizes, room)
        assert best <= fetched(uses, sizes, kept) <= 1.02 * best


def test_costs_need_not_be_sizes() -> None:
    # Over several ranks a fetch moves less than the chunk takes: here the larger chunk is the cheaper one.
    gaps = [Gap(0, 0, 2, size_bytes=10, fetch_bytes=1), Gap(1, 0, 2, size_bytes=6, fetch_bytes=5)]
    assert choose_gaps(gaps, [20, 10, 20]) == {gaps[1]}


def test_a_gap_too_large_for_its_room_is_dropped_and_nothing_else() -> None:
    gaps = [Gap(0, 0, 3, 10, 10), Gap(1, 0, 2, 5, 5)]
    assert choose_gaps(gaps, [0, 10, 9, 0]) == {gaps[1]}
    assert choose_gaps([], []) == frozenset()


@pytest.mark.parametrize("shape", ["all different", "one tiny, one large", "two sizes"])
def test_long_traces_take_a_second(shape: str) -> None:
    chance = random.Random(shape)
    count = 100
    uses = [*range(count), *reversed(range(count))] * 4
    sizes = {
        "all different": [chance.randint(1, 1000) for _ in range(count)],
        "one tiny, one large": [1 + unit % 2 * 1000 + unit for unit in range(count)],
        "two sizes": [100 + unit % 2 * 50 for unit in range(count)],
    }[shape]
    for tightness in (0.02, 0.3, 0.6, 0.95):
        free = [int(sum(sizes) * tightness * chance.uniform(0.1, 1.0)) for _ in uses]
        began = time.process_time()
        kept = choose_gaps(gaps_of(uses, sizes), free)
        assert time.process_time() - began < 2.0
        assert room_left(uses, sizes, kept, [f + sizes[c] for f, c in zip(free, uses, strict=True)]) >= 0


def test_the_first_units_are_let_go_of_at_the_turn() -> None:
    # Forward 0 to 4, backward 4 to 0, room for two beside the one in use: the last units stay.
    uses = [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    kept = choose_gaps(gaps_of(uses, [1] * 5), [2] * 10)
    assert sorted(gap.chunk for gap in kept) == [2, 3]
