"""Samples of like length near one another: an order that hangs on nothing but the seed, the lengths and the size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.data import BatchLayout, Buckets, SampleOrder, epoch_permutation
from albireo.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200).map(lambda values: np.array(values, dtype=np.int64))


@given(lengths=LENGTHS, size=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 5))
def test_each_epoch_has_each_sample_once(lengths: np.ndarray, size: int, seed: int, epoch: int) -> None:
    permutation = epoch_permutation(len(lengths), seed, epoch)
    arranged = Buckets(lengths, size).arranged(permutation, seed, epoch)
    assert sorted(arranged.tolist()) == list(range(len(lengths)))
    again = Buckets(lengths.copy(), size).arranged(permutation.copy(), seed, epoch)
    assert arranged.tolist() == again.tolist()
    if size == 1:
        assert arranged.tolist() == permutation.tolist()


@given(lengths=LENGTHS, size=st.integers(2, 20), seed=st.integers(0, 9), epochs=st.integers(1, 4))
def test_whole_buckets_of_a_pool_hold_neighbours_in_length(
    lengths: np.ndarray, size: int, seed: int, epochs: int
) -> None:
    """With one pool, buckets that lie whole within an epoch do not overlap in length: that is all the padding to save."""
    samples = len(lengths)
    order = SampleOrder(samples, seed, Buckets(lengths, size))
    stream = order.take(0, samples * epochs)
    for epoch in range(epochs):
        first = -(-epoch * samples // size) * size
        whole = [
            sorted(lengths[stream[start : start + size]].tolist())
            for start in range(first, (epoch + 1) * samples - size + 1, size)
        ]
        if 2 <= len(whole) <= 64:
            ranges = sorted((bucket[0], bucket[-1]) for bucket in whole)
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))


@given(
    lengths=LENGTHS,
    size=st.integers(1, 24),
    seed=st.integers(0, 9),
    start=st.integers(0, 300),
    split=st.sampled_from([(1, 1, 12), (2, 1, 6), (1, 3, 4), (3, 2, 2), (4, 3, 1)]),
)
def test_a_step_has_the_same_samples_however_it_is_cut_up(
    lengths: np.ndarray, size: int, seed: int, start: int, split: tuple[int, int, int]
) -> None:
    ranks, accumulate, batch = split
    order = SampleOrder(len(lengths), seed, Buckets(lengths, size))
    dealt = [list(order.micro_batches(BatchLayout(batch, accumulate, rank, ranks), start, 2)) for rank in range(ranks)]
    for step in range(2):
        mine = [row[step * accumulate : (step + 1) * accumulate] for row in dealt]
        samples = [index for rows in mine for row in rows for index in row]
        assert sorted(samples) == sorted(order.take(start + 12 * step, 12).tolist())
        # Micro-batches that ranks compute at one time are neighbours in length.
        flat = [lengths[index] for number in range(accumulate) for rows in mine for index in rows[number]]
        assert flat == sorted(flat)


def test_buckets_save_padding_in_every_epoch() -> None:
    lengths = np.random.default_rng(3).integers(10, 1000, size=1003).astype(np.int64)

    def padding(buckets: Buckets | None) -> list[float]:
        order = SampleOrder(len(lengths), 5, buckets)
        shares = []
        for epoch in range(3):
            first = epoch * 1003 // 8
            rows = [lengths[order.take(8 * step, 8)] for step in range(first, first + 100)]
            shares.append(1 - sum(int(row.sum()) for row in rows) / sum(8 * int(row.max()) for row in rows))
        return shares

    assert min(padding(None)) > 0.35
    assert max(padding(Buckets(lengths, 8))) < 0.05


def test_short_and_long_come_mixed() -> None:
    """Buckets are shuffled: training does not go from short to long."""
    lengths = np.arange(512, dtype=np.int64)
    stream = SampleOrder(512, 1, Buckets(lengths, 8)).take(0, 512)
    means = lengths[stream].reshape(-1, 8).mean(axis=1)
    assert abs(np.corrcoef(np.arange(64), means)[0, 1]) < 0.3


def test_what_has_no_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Buckets(np.ones(3, dtype=np.int64), 0)
    with pytest.raises(DataError, match="no samples"):
        Buckets(np.ones(0, dtype=np.int64), 2)
    with pytest.raises(DataError, match="lengths of 3 samples, and 4"):
        SampleOrder(4, 0, Buckets(np.ones(3, dtype=np.int64), 2))
