from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.data.order import BatchLayout, SampleOrder, epoch_of, epoch_permutation, samples_at, steps_for
from albireo.errors import ConfigError, DataError

SIZES = st.integers(1, 60)
SEEDS = st.integers(-(2**40), 2**40)


def step_samples(size: int, seed: int, layout: BatchLayout, start: int, steps: int) -> list[list[list[int]]]:
    """[steps][micro-batches of a rank][samples]."""
    flat = list(SampleOrder(size, seed).micro_batches(layout, start, steps))
    return [flat[step * layout.accumulate : (step + 1) * layout.accumulate] for step in range(steps)]


@given(SIZES, SEEDS, st.integers(0, 5))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    taken = samples_at(epoch * size, size, size, seed)
    assert sorted(taken.tolist()) == list(range(size))
    assert taken.tolist() == epoch_permutation(size, seed, epoch).tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(epoch_permutation(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(50)) not in orders


def test_the_order_is_the_same_in_every_version() -> None:
    # A resume of a run that an older version began has to find the same order.
    assert epoch_permutation(10, 0, 0).tolist() == [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]
    assert epoch_permutation(10, 42, 3).tolist() == [9, 7, 1, 5, 0, 3, 6, 4, 2, 8]


def test_every_sample_lands_everywhere_equally_often() -> None:
    counts = np.zeros((5, 5))
    for seed in range(2000):
        for place, sample in enumerate(epoch_permutation(5, seed, 0)):
            counts[place, sample] += 1
    assert np.abs(counts / 2000 - 0.2).max() < 0.04


@given(SIZES, SEEDS, st.integers(0, 200), st.integers(0, 100), st.data())
def test_a_resume_gives_the_rest_of_the_stream(
    size: int, seed: int, start: int, count: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, count))
    whole = samples_at(start, count, size, seed).tolist()
    assert (
        whole == samples_at(start, cut, size, seed).tolist() + samples_at(start + cut, count - cut, size, seed).tolist()
    )


@given(SIZES, SEEDS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 70))
def test_ranks_and_micro_batches_partition_each_step(
    size: int, seed: int, batch_size: int, accumulate: int, world_size: int, start: int
) -> None:
    ranks = [
        step_samples(size, seed, BatchLayout(batch_size, accumulate, rank, world_size), start, 3)
        for rank in range(world_size)
    ]
    samples_per_step = batch_size * accumulate * world_size
    for step in range(3):
        # Micro-batch by micro-batch, rank after rank: the stream itself, without a gap and nothing twice.
        joined = [s for micro in range(accumulate) for rank in ranks for s in rank[step][micro]]
        assert joined == samples_at(start + step * samples_per_step, samples_per_step, size, seed).tolist()
        assert all(len(micro) == batch_size for rank in ranks for micro in rank[step])


@given(SIZES, SEEDS, st.sampled_from([(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)]))
def test_a_step_takes_the_same_samples_at_any_world_size(size: int, seed: int, shape: tuple[int, int, int]) -> None:
    world_size, batch_size, accumulate = shape
    expected = [sorted(step[0]) for step in step_samples(size, seed, BatchLayout(8), 0, 4)]
    ranks = [
        step_samples(size, seed, BatchLayout(batch_size, accumulate, rank, world_size), 0, 4)
        for rank in range(world_size)
    ]
    assert [sorted(s for rank in ranks for micro in rank[step] for s in micro) for step in range(4)] == expected


def test_one_micro_batch_is_the_ranks_side_by_side() -> None:
    one = step_samples(40, 3, BatchLayout(8, 2), 0, 2)
    left = step_samples(40, 3, BatchLayout(4, 2, 0, 2), 0, 2)
    right = step_samples(40, 3, BatchLayout(4, 2, 1, 2), 0, 2)
    for step in range(2):
        for micro in range(2):
            assert one[step][micro] == left[step][micro] + right[step][micro]


@given(st.integers(1, 5), st.integers(1, 1000), st.integers(1, 64))
def test_steps_cover_the_epochs_and_no_more_than_needed(epochs: int, size: int, samples_per_step: int) -> None:
    steps = steps_for(epochs, size, samples_per_step)
    assert (steps - 1) * samples_per_step < epochs * size <= steps * samples_per_step


def test_part_of_an_epoch() -> None:
    assert steps_for(0.5, 100, 8) == 7
    assert [epoch_of(position, 10) for position in (0, 9, 10, 25)] == [0, 0, 1, 2]


@pytest.mark.parametrize("epochs", [0, -1, float("nan"), float("inf")])
def test_epochs_have_to_be_above_0(epochs: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        steps_for(epochs, 10, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "batch_size must be at least 1, not 0"),
        ((1, 0), "accumulate must be at least 1"),
        ((1, 1, 0, 0), "world_size must be at least 1"),
        ((1, 1, 2, 2), r"rank must lie in 0\.\.1"),
        ((1, 1, -1, 2), "rank must lie"),
    ],
)
def test_a_layout_refuses_what_cannot_be(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchLayout(*arguments)


def test_what_cannot_be_taken() -> None:
    with pytest.raises(DataError, match="no samples"):
        SampleOrder(0, 0)
    with pytest.raises(ConfigError, match="at least 0"):
        samples_at(-1, 2, 10, 0)
