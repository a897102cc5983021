from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.data.split_names import SplitPlan, assign_splits


@pytest.mark.parametrize(
    ("names", "plan"),
    [
        (["a.txt", "b.txt"], SplitPlan(("a.txt", "b.txt"), (), ())),
        (
            ["wiki.test.raw", "wiki.train.raw", "wiki.valid.raw"],
            SplitPlan(("wiki.train.raw",), ("wiki.valid.raw",), ("wiki.test.raw",)),
        ),
        (["wiki.test.raw"], SplitPlan(("wiki.test.raw",), (), ())),
        (["test.txt", "validation.txt"], SplitPlan(("validation.txt",), (), ("test.txt",))),
        (["train", "validation", "test"], SplitPlan(("train",), ("validation",), ("test",))),
        (["train-00001.jsonl", "README.md"], SplitPlan(("train-00001.jsonl",), (), ("README.md",))),
        (["book.txt", "val.txt"], SplitPlan(("book.txt",), ("val.txt",), ())),
        (["train/a.txt", "valid/a.txt", "test/a.txt"], SplitPlan(("train/a.txt",), ("valid/a.txt",), ("test/a.txt",))),
        (["train_v2.txt", "DEV.txt"], SplitPlan(("train_v2.txt",), ("DEV.txt",), ())),
        # Words that only begin so, and folders that somebody named, say nothing.
        (["contest.txt", "trainspotting.txt", "value.txt"], SplitPlan(("contest.txt", "trainspotting.txt", "value.txt"), (), ())),
        (["my-test-corpus/a.txt", "other/b.txt"], SplitPlan(("my-test-corpus/a.txt", "other/b.txt"), (), ())),
        ([], SplitPlan((), (), ())),
    ],
)  # fmt: skip
def test_names_tell_the_splits(names: list[str], plan: SplitPlan) -> None:
    assert assign_splits(names) == plan


@given(
    st.lists(st.sampled_from(["train.a", "b", "valid.c", "test.d", "e", "dev/f", "test/g", "train2.h"]), unique=True)
)
def test_every_name_is_used_once_and_there_is_something_to_train_on(names: list[str]) -> None:
    plan = assign_splits(names)
    assert sorted(plan.train + plan.validation + plan.left_aside) == sorted(names)
    assert bool(plan.train) == bool(names)
