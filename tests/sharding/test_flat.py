"""The flat buffer's numbers: every element in one partition, once, aligned."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.errors import ConfigError
from albireo.sharding import ALIGNMENT, FlatLayout, plan_buckets

shapes = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=12)


@given(shapes, st.integers(1, 9))
def test_every_element_is_in_one_partition_once(shapes: list[tuple[int, ...]], ranks: int) -> None:
    layout = FlatLayout.of(shapes, ranks)
    seen: dict[int, list[tuple[int, int]]] = {}
    for rank in range(ranks):
        for cut in layout.cuts(rank):
            assert cut.numel > 0
            assert 0 <= cut.offset <= cut.offset + cut.numel <= layout.partition_numel
            # The same element, by the partition and by the segment.
            segment = layout.segments[cut.segment]
            assert rank * layout.partition_numel + cut.offset == segment.offset + cut.start
            seen.setdefault(cut.segment, []).append((cut.start, cut.stop))
    for number, shape in enumerate(shapes):
        covered = 0
        for start, stop in sorted(seen.get(number, [])):
            assert start == covered
            covered = stop
        assert covered == math.prod(shape)


@given(shapes, st.integers(1, 9))
def test_tensors_and_cuts_are_aligned_and_never_overlap(shapes: list[tuple[int, ...]], ranks: int) -> None:
    layout = FlatLayout.of(shapes, ranks)
    assert layout.numel % (ALIGNMENT * ranks) == 0
    assert layout.numel == layout.partition_numel * ranks
    assert layout.waste == layout.numel - sum(math.prod(shape) for shape in shapes)
    end = 0
    for segment in layout.segments:
        assert segment.offset % ALIGNMENT == 0
        assert end <= segment.offset < end + ALIGNMENT
        end = segment.stop
    assert end <= layout.numel < end + ALIGNMENT * (ranks + 1)
    for rank in range(ranks):
        for cut in layout.cuts(rank):
            assert cut.start % ALIGNMENT == 0
            assert cut.offset % ALIGNMENT == 0


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 120))
def test_buckets_keep_the_order_and_the_bound(numels: list[int], bucket_elements: int) -> None:
    buckets = plan_buckets(numels, bucket_elements)
    assert [number for bucket in buckets for number in bucket] == list(range(len(numels)))
    for bucket in buckets:
        assert bucket
        assert len(bucket) == 1 or sum(numels[number] for number in bucket) <= bucket_elements


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 120))
def test_no_bucket_ends_before_it_must(numels: list[int], bucket_elements: int) -> None:
    buckets = plan_buckets(numels, bucket_elements)
    for bucket, following in itertools.pairwise(buckets):
        assert sum(numels[number] for number in bucket) + numels[following[0]] > bucket_elements


def test_a_layout_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 rank"):
        FlatLayout.of([(3,)], 0)
    with pytest.raises(ConfigError, match="no partition of rank 2"):
        FlatLayout.of([(3,)], 2).cuts(2)
    with pytest.raises(ConfigError, match="at least 1 element"):
        plan_buckets([1], 0)
