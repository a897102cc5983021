"""Which files, or which named parts of a data set, are for training and which for evaluation. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType

__all__ = ["SplitPlan", "assign_splits"]

_ROLES = MappingProxyType(
    {
        "train": "train",
        "training": "train",
        "valid": "validation",
        "validation": "validation",
        "val": "validation",
        "dev": "validation",
        "test": "test",
        "testing": "test",
    }
)
_WORD = re.compile(r"(?<![a-z])(" + "|".join(sorted(_ROLES, key=len, reverse=True)) + r")(?![a-z])")


@dataclass(frozen=True)
class SplitPlan:
    """What each name is used for.

    Attributes:
        train: names to train on, in the order they came.
        validation: names to evaluate on; empty where there are none.
        left_aside: names that are used for nothing.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    left_aside: tuple[str, ...]


def assign_splits(names: Iterable[str]) -> SplitPlan:
    """Decide by the names: `wiki.train.raw` and `train/part1.txt` train, `wiki.valid.raw` evaluates.

    Names that say nothing are for training where none says train, else they are left aside. A test part is left aside
    unless it is all there is; so is a validation part with nothing to train on: it becomes what is trained on.

    Args:
        names: relative file paths with slashes, or names of splits.
    """
    by_role: dict[str, list[str]] = {"train": [], "unnamed": [], "validation": [], "test": []}
    for name in names:
        by_role[_role(name)].append(name)
    trained = next((role for role, members in by_role.items() if members), "train")
    validation = by_role["validation"] if trained in ("train", "unnamed") else []
    used = {*by_role[trained], *validation}
    left_aside = [name for members in by_role.values() for name in members if name not in used]
    return SplitPlan(tuple(by_role[trained]), tuple(validation), tuple(left_aside))


def _role(name: str) -> str:
    path = PurePosixPath(name.lower())
    if found := _WORD.search(path.name):
        return _ROLES[found.group(1)]
    # A folder has to be named exactly so: `my-test-corpus` is a name that somebody gave, not a split.
    return next((_ROLES[part] for part in reversed(path.parts[:-1]) if part in _ROLES), "unnamed")
