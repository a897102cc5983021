"""Pictures made ready for a model: those that can be read, a part of them held out, each as bytes of one size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from albireo.data.loader import IGNORED_LABEL, Batching
from albireo.data.order import BatchLayout, epoch_permutation
from albireo.data.picture_form import PictureForm
from albireo.data.picture_source import PictureSource
from albireo.data.store import built_once, key_of
from albireo.device.cores import usable_cores
from albireo.errors import DataError

__all__ = ["PictureBatch", "PictureData", "Pictures", "evaluation_pictures", "picture_batching", "prepare_pictures"]

_FILE = "damaged.json"
_VERSION = 1
_MOST_NAMED = 5


@dataclass(frozen=True, eq=False)
class PictureBatch:
    """One micro-batch of pictures of one rank.

    Attributes:
        pixel_values: uint8, [batch, 3, height, width].
        labels: int64, [batch]; -100 for what only fills up.
        tokens: how many pictures count, a number on the host.
    """

    pixel_values: Tensor
    labels: Tensor
    tokens: int

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """Return the batch on a device."""
        pixels = self.pixel_values.to(device, non_blocking=non_blocking)
        return type(self)(pixels, self.labels.to(device, non_blocking=non_blocking), self.tokens)


class Pictures(Dataset[dict[str, Any]]):
    """Some of a source's pictures, decoded when they are asked for.

    With augmentation a picture is asked for by its index plus the length times the epoch, and another part of it is
    given in each.

    Args:
        source: has them.
        numbers: which, by the source's numbers.
        form: what they become.
        seed: of the parts that are cut out; None: all of each picture is given.
    """

    def __init__(self, source: PictureSource, numbers: Sequence[int], form: PictureForm, seed: int | None) -> None:
        self.source, self.form = source, form
        self.numbers = tuple(numbers)
        self._seed = seed

    def __len__(self) -> int:
        return len(self.numbers)

    def some(self, places: Iterable[int]) -> Pictures:
        """Return some of them, whole; a place that there is not is left out.

        Args:
            places: which.
        """
        numbers = [self.numbers[place] for place in places if place < len(self.numbers)]
        return Pictures(self.source, numbers, self.form, None)

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(index, len(self.numbers))
        number = self.numbers[place]
        try:
            picture = self.source.open(number)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.source.name(number)} could be read before, and cannot now: {error}") from error
        if self._seed is None:
            pixels = self.form.whole(picture)
        else:
            pixels = self.form.part(picture, seed=self._seed, epoch=epoch, index=number)
        return {"pixel_values": pixels, "labels": self.source.labels[number]}


@dataclass(frozen=True)
class PictureData:
    """What a run trains on.

    Attributes:
        train: pictures to train on.
        held_out: pictures to evaluate on.
        damaged: names of those that cannot be read.
    """

    train: Pictures
    held_out: Pictures
    damaged: tuple[str, ...]


def prepare_pictures(
    source: PictureSource,
    form: PictureForm,
    *,
    holdout_share: float,
    augment: bool,
    max_damaged: float,
    seed: int,
    cache_folder: Path | None,
    progress: Callable[[int, int], None],
) -> PictureData:
    """Look at each picture once, if it is not made up, leave out those that cannot be read, and hold some out.

    Args:
        source: all pictures.
        form: what they become.
        holdout_share: of each class, where the source has no part of its own to evaluate on.
        augment: train on a random part of each.
        max_damaged: how many may be damaged: a share of all if below 1, a number otherwise.
        seed: decides what is held out, and the parts.
        cache_folder: where it is kept which are damaged; None: nowhere.
        progress: told how many have been looked at, of how many.

    Raises:
        DataError: too many are damaged, or of a class none is left to train on.
    """
    damaged = [] if source.is_made_up else _damaged(source, cache_folder, progress)
    names = tuple(source.name(number) for number in damaged)
    most = max_damaged * len(source.labels) if max_damaged < 1 else max_damaged
    if len(damaged) > most:
        more = f" and {len(damaged) - _MOST_NAMED} more" if len(damaged) > _MOST_NAMED else ""
        raise DataError(
            f"{len(damaged)} of {len(source.labels)} pictures cannot be read, more than --max-damaged {max_damaged:g} allows: "
            f"{', '.join(names[:_MOST_NAMED])}{more}"
        )
    left_out = set(damaged)
    whole = [number for number in range(len(source.labels)) if number not in left_out]
    own = set(source.held_out)
    held_out = [number for number in whole if number in own] if own else _held_out(source, whole, holdout_share, seed)
    taken = set(held_out)
    train = [number for number in whole if number not in taken and number not in own]
    there = {source.labels[number] for number in train}
    for label, name in enumerate(source.classes):
        if label not in there:
            raise DataError(f"of the class {name} no picture is left to train on: give more, or a smaller --holdout")
    if not held_out:
        raise DataError("no picture is left to evaluate on: give more, or a larger --holdout")
    return PictureData(
        train=Pictures(source, train, form, seed if augment else None),
        held_out=Pictures(source, held_out, form, None),
        damaged=names,
    )


def picture_batching(*, augment: bool) -> Batching:
    """Return how pictures become batches.

    Args:
        augment: another part of each is given in each epoch.
    """
    return Batching(collate=_collate, make=_as_batch, counts_epochs=augment)


def evaluation_pictures(pictures: Pictures, batch_size: int, rank: int, world_size: int) -> Iterator[PictureBatch]:
    """Yield this rank's share of pictures, as `evaluation_batches` deals samples; threads read a batch ahead.

    Args:
        pictures: all of them.
        batch_size: pictures in a batch of one rank.
        rank: this rank.
        world_size: ranks that share them.
    """
    layout = BatchLayout(batch_size, 1, rank, world_size)
    size = len(pictures)

    def indices() -> Iterator[tuple[list[int], int]]:
        for first in range(0, size, layout.samples_per_step):
            left = min(layout.samples_per_step, size - first)
            own = range(first + left * rank // world_size, first + left * (rank + 1) // world_size)
            yield [*own, *[first] * (batch_size - len(own))], len(own)

    with ThreadPoolExecutor(max(1, usable_cores() - 1), thread_name_prefix="pictures") as pool:
        ahead: list[tuple[list[Any], int]] = []
        for numbers, counted in indices():
            ahead.append(([pool.submit(pictures.__getitem__, number) for number in numbers], counted))
            if len(ahead) > 1:
                yield _evaluated(*ahead.pop(0))
        for waiting in ahead:
            yield _evaluated(*waiting)


def _evaluated(waiting: list[Any], counted: int) -> PictureBatch:
    columns = _collate([future.result() for future in waiting])
    columns["labels"][counted:] = IGNORED_LABEL
    return _as_batch(columns)


def _collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples], dtype=torch.int64),
    }


def _as_batch(columns: Mapping[str, Tensor]) -> PictureBatch:
    labels = columns["labels"]
    return PictureBatch(columns["pixel_values"], labels, int((labels != IGNORED_LABEL).sum()))


def _held_out(source: PictureSource, numbers: Sequence[int], share: float, seed: int) -> list[int]:
    """Return about a share of each class's pictures, one at least."""
    taken: list[int] = []
    for label in range(len(source.classes)):
        own = [number for number in numbers if source.labels[number] == label]
        if own:
            order = epoch_permutation(len(own), seed, label)
            count = max(1, round(share * len(own)))
            taken += [own[place] for place in np.sort(order[:count]).tolist()]
    return sorted(taken)


def _damaged(source: PictureSource, cache_folder: Path | None, progress: Callable[[int, int], None]) -> list[int]:
    if cache_folder is None:
        return _look(source, progress)

    def build(folder: Path) -> None:
        (folder / _FILE).write_text(json.dumps(_look(source, progress)))

    entry = built_once(cache_folder, "pictures", key_of(_VERSION, source.fingerprint()), build)
    found: list[int] = json.loads((entry / _FILE).read_text())
    return found


def _look(source: PictureSource, progress: Callable[[int, int], None]) -> list[int]:
    """Read each picture, and return the numbers of those that cannot be."""
    total = len(source.labels)

    def is_damaged(number: int) -> bool:
        try:
            source.open(number)
        except (OSError, ValueError):
            return True
        return False

    damaged = []
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="pictures") as pool:
        for number, bad in enumerate(pool.map(is_damaged, range(total))):
            if bad:
                damaged.append(number)
            progress(number + 1, total)
    return damaged
