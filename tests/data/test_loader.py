from __future__ import annotations

import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from albireo.data import IGNORED_LABEL, Batch, BatchLayout, RandomTokens, StepLoader, evaluation_batches, samples_at
from albireo.errors import ConfigError, DataError


class Numbered(Dataset[dict[str, Any]]):
    """Sample n is the number n, three times; without the quick way to many at once."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.full((3,), index), "name": "is not asked for"}


class Labelled(Numbered):
    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.arange(4) + index
        return {"input_ids": ids, "labels": torch.where(torch.arange(4) < index % 5, IGNORED_LABEL, ids)}


def samples(batch: Batch) -> list[int]:
    return batch.input_ids[:, 0].tolist()


def counted_samples(batch: Batch) -> list[int]:
    return [sample for sample, row in zip(samples(batch), batch.labels, strict=True) if (row != IGNORED_LABEL).any()]


def test_steps_hold_their_micro_batches_in_the_global_order() -> None:
    loader = StepLoader(Numbered(10), BatchLayout(3, 2), seed=4, start_sample=7, steps=5)
    steps = list(loader)
    assert len(loader) == len(steps) == 5
    assert all(len(step) == 2 for step in steps)
    assert [s for step in steps for batch in step for s in samples(batch)] == samples_at(7, 30, 10, 4).tolist()
    # Iterating again begins again.
    assert samples(next(iter(loader))[0]) == samples(steps[0][0])


def test_two_ranks_read_what_one_reads() -> None:
    one = list(StepLoader(Numbered(20), BatchLayout(8, 2), seed=1, steps=4))
    two = [list(StepLoader(Numbered(20), BatchLayout(4, 2, rank, 2), seed=1, steps=4)) for rank in range(2)]
    for step in range(4):
        for micro in range(2):
            assert samples(one[step][micro]) == samples(two[0][step][micro]) + samples(two[1][step][micro])


def test_a_resume_at_another_world_size_goes_on() -> None:
    whole = list(StepLoader(Numbered(20), BatchLayout(4), seed=1, steps=6))
    rest = [
        list(StepLoader(Numbered(20), BatchLayout(2, 1, rank, 2), seed=1, start_sample=8, steps=4)) for rank in range(2)
    ]
    for step in range(4):
        assert samples(whole[step + 2][0]) == samples(rest[0][step][0]) + samples(rest[1][step][0])


def test_packed_text_is_its_own_label() -> None:
    (step,) = StepLoader(RandomTokens(50, 16, 99, seed=0), BatchLayout(4), seed=0, steps=1)
    batch = step[0]
    assert batch.labels is batch.input_ids
    assert batch.input_ids.shape == (4, 16)
    assert batch.input_ids.dtype == torch.int64
    assert batch.tokens == 4 * 15
    moved = batch.to(torch.device("cpu"))
    assert moved.labels is moved.input_ids


def test_targets_that_do_not_count_are_not_counted() -> None:
    (batch,) = evaluation_batches(Labelled(5), 5)
    assert batch.labels is not batch.input_ids
    # Of four places the first is never a target: 3, 3, 2, 1 and 0 are left.
    assert batch.tokens == 9
    assert batch.tokens == int((batch.labels[:, 1:] != IGNORED_LABEL).sum())
    moved = batch.to(torch.device("cpu"))
    assert moved.labels.tolist() == batch.labels.tolist()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_global_random_state_is_used(num_workers: int) -> None:
    before = torch.get_rng_state().clone(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    loader = StepLoader(RandomTokens(50, 16, 99, seed=0), BatchLayout(4), seed=-3, steps=3, num_workers=num_workers)
    taken = [samples(batch) for step in loader for batch in step]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
    blocks = RandomTokens(50, 16, 99, seed=0)
    assert list(chain.from_iterable(taken)) == [
        int(blocks[s]["input_ids"][0]) for s in samples_at(0, 12, 50, -3).tolist()
    ]


def test_no_steps() -> None:
    assert list(StepLoader(Numbered(5), BatchLayout(2), seed=0, steps=0)) == []


@pytest.mark.parametrize(("start_sample", "steps"), [(-1, 1), (0, -1)])
def test_negative_positions_are_refused(start_sample: int, steps: int) -> None:
    with pytest.raises(ConfigError, match="must be at least 0"):
        StepLoader(Numbered(5), BatchLayout(2), seed=0, start_sample=start_sample, steps=steps)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        StepLoader(Numbered(0), BatchLayout(2), seed=0, steps=1)
    with pytest.raises(DataError, match="nothing to evaluate on"):
        next(evaluation_batches(Numbered(0), 2))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_counts_every_sample_once_and_ranks_keep_step(size: int, batch_size: int, world_size: int) -> None:
    ranks = [list(evaluation_batches(Numbered(size), batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for batches in ranks for batch in batches]
    assert sorted(s for batch in batches for s in counted_samples(batch)) == list(range(size))
    assert sum(batch.tokens for batch in batches) == size * 2
    # One shape for all, the last ones too.
    assert {tuple(batch.input_ids.shape) for batch in batches} == {(batch_size, 3)}


def test_evaluation_is_in_order_and_rows_that_fill_up_count_for_nothing() -> None:
    batches = list(evaluation_batches(Numbered(7), 3))
    assert [counted_samples(batch) for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert batches[0].labels is batches[0].input_ids
    assert batches[-1].tokens == 2
    assert (batches[-1].labels[1:] == IGNORED_LABEL).all()


def test_rows_that_fill_up_leave_labels_of_their_own_alone() -> None:
    last = list(evaluation_batches(Labelled(4), 3))[-1]
    assert torch.equal(last.labels[0], Labelled(4)[3]["labels"])
    assert (last.labels[1:] == IGNORED_LABEL).all()


def test_a_rank_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank must lie"):
        next(evaluation_batches(Numbered(7), 3, 2, 2))
