"""Which chunks are streamed: host and stream are done at about the same time, or nothing is streamed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.memory.budget import ChunkBytes
from albireo.memory.rates import HOPPER, Rates
from albireo.memory.stepping_places import share_of_host, stepping_seconds, streamed_by_time, streamed_bytes

M = 10**6
numbers = st.lists(st.integers(1, 200).map(lambda millions: millions * M), max_size=30)


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    parameters = draw(numbers)
    chosen = draw(st.sets(st.sampled_from(range(len(parameters))))) if parameters else set()
    return sorted(chosen), parameters


@given(orders())
def test_what_is_streamed_saves_time_or_is_nothing(case: tuple[list[int], list[int]]) -> None:
    order, parameters = case
    streamed = streamed_by_time(order, parameters, HOPPER)
    assert streamed <= set(order)
    alone = stepping_seconds(order, parameters, frozenset(), HOPPER)
    assert alone == pytest.approx(sum(parameters[chunk] for chunk in order) / HOPPER.host_steps)
    if streamed:
        assert stepping_seconds(order, parameters, streamed, HOPPER) <= 0.9 * alone
        # Neither side is done long before the other: by no more than a chunk.
        host = sum(parameters[chunk] for chunk in order if chunk not in streamed) / HOPPER.host_steps_beside
        through = sum(parameters[chunk] for chunk in streamed) / HOPPER.streamed_steps_beside
        largest = max(parameters[chunk] for chunk in order)
        assert abs(host - through) <= largest / HOPPER.streamed_steps_beside + 1e-9


@given(orders(), st.data())
def test_no_share_takes_longer_than_each_side_by_itself(case: tuple[list[int], list[int]], data: st.DataObject) -> None:
    order, parameters = case
    streamed = frozenset(data.draw(st.sets(st.sampled_from(order)))) if order else frozenset()
    taken = stepping_seconds(order, parameters, streamed, HOPPER)
    total = sum(parameters[chunk] for chunk in order)
    together = total / (HOPPER.host_steps_beside + HOPPER.streamed_steps_beside)
    assert together - 1e-9 <= taken <= total / HOPPER.streamed_steps + 1e-9


@given(orders(), st.floats(0, 1))
def test_a_share_is_met_to_within_half_the_largest_chunk(case: tuple[list[int], list[int]], share: float) -> None:
    order, parameters = case
    streamed = share_of_host(order, parameters, share)
    total = sum(parameters[chunk] for chunk in order)
    largest = max((parameters[chunk] for chunk in order), default=0)
    assert streamed <= set(order)
    assert abs(sum(parameters[chunk] for chunk in streamed) - share * total) <= largest / 2 + 1
    if share in (0, 1):
        assert streamed == (frozenset(order) if share else frozenset())


def test_the_27b_models_steps_are_dealt_to_both() -> None:
    # 2.2 G parameters on the host: 0.51 s by the host alone, 0.42 s by both.
    parameters = [39 * M] * 56
    streamed = streamed_by_time(range(56), parameters, HOPPER)
    assert 20 <= len(streamed) <= 28
    assert stepping_seconds(range(56), parameters, frozenset(), HOPPER) == pytest.approx(0.508, abs=0.001)
    assert stepping_seconds(range(56), parameters, streamed, HOPPER) == pytest.approx(0.414, abs=0.01)


def test_where_streaming_saves_little_nothing_is_streamed() -> None:
    assert streamed_by_time(range(4), [M] * 4, HOPPER) == frozenset()
    slow = Rates(4.3e9, 0.1e9, 4.2e9, 0.1e9, 1e11, 55e9)
    assert streamed_by_time(range(50), [50 * M] * 50, slow) == frozenset()


def test_streaming_moves_states_both_ways_and_the_gradient_back() -> None:
    # Of one parameter in bf16: 12 in, 12 out, 2 of the gradient in, 2 of the weight home; a resident one saves 2 in.
    narrow = ChunkBytes(2, 2, 12, 2, 2, trained=True, is_root=False)
    assert streamed_bytes(narrow, resident=False, masters_at_home=False) == 28
    assert streamed_bytes(narrow, resident=True, masters_at_home=False) == 26
    # In fp32 the master is the weight: 12 in, 12 out, 4 of the gradient in.
    wide = ChunkBytes(4, 4, 8, 4, 4, trained=True, is_root=False)
    assert streamed_bytes(wide, resident=False, masters_at_home=True) == 28
    assert streamed_bytes(wide, resident=True, masters_at_home=True) == 24
