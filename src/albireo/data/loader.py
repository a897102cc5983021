"""Batches: what one rank computes on in one optimizer step, and what it evaluates on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from albireo.data.buckets import Buckets
from albireo.data.order import BatchLayout, SampleOrder
from albireo.errors import ConfigError, DataError

__all__ = [
    "IGNORED_LABEL",
    "AnyBatch",
    "AnyDataset",
    "Batch",
    "Batching",
    "Collate",
    "StepLoader",
    "evaluation_batches",
]

IGNORED_LABEL = -100
"""A label that counts for nothing, as in transformers and in `torch.nn.functional.cross_entropy`."""

AnyDataset = Dataset[Any]

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
"""Makes columns [batch, ...] of samples."""


class AnyBatch(Protocol):
    """One micro-batch of one rank, whatever is in it."""

    @property
    def tokens(self) -> int:
        """How many terms the loss is a mean of, a number on the host."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """Return the batch on a device."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of token ids of one rank.

    Attributes:
        input_ids: int64, [batch, length].
        labels: int64, [batch, length], not shifted: the id to be predicted at a place stands at that place. For packed
            text it is `input_ids` itself, the same tensor.
        tokens: how many targets count after the shift: places from the second on whose label is not -100. A number
            on the host, so that nobody has to wait for the device to know it.
    """

    input_ids: Tensor
    labels: Tensor
    tokens: int

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """Return the batch on a device; what was one tensor stays one."""
        input_ids = self.input_ids.to(device, non_blocking=non_blocking)
        same = self.labels is self.input_ids
        labels = input_ids if same else self.labels.to(device, non_blocking=non_blocking)
        return type(self)(input_ids, labels, self.tokens)


def _as_batch(columns: Mapping[str, Tensor]) -> Batch:
    # Made after pinning, which would turn one tensor under two names into two.
    input_ids = columns["input_ids"]
    labels = columns.get("labels", input_ids)
    if labels is input_ids:
        return Batch(input_ids, input_ids, input_ids.shape[0] * (input_ids.shape[1] - 1))
    return Batch(input_ids, labels, int((labels[:, 1:] != IGNORED_LABEL).sum()))


def _collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    columns: dict[str, Tensor] = default_collate(
        [{name: sample[name] for name in ("input_ids", "labels") if name in sample} for sample in samples]
    )
    return columns


@dataclass(frozen=True)
class Batching:
    """How samples become batches.

    Attributes:
        buckets: puts samples of like length near one another; None: all in random order.
        collate: makes columns of samples; by default of such as have one shape.
        make: makes a batch of columns; by default one of token ids.
        counts_epochs: a sample is asked for by its index plus the data set's size times the epoch, so that it may be
            another one in each.
    """

    buckets: Buckets | None = None
    collate: Collate = _collate
    make: Callable[[Mapping[str, Tensor]], AnyBatch] = _as_batch
    counts_epochs: bool = False


class StepLoader:
    """Gives one rank the micro-batches of each optimizer step, in the global order of samples.

    The first step takes the samples from `start_sample` on, wherever a run before had ended. Iterating again begins
    there again. No global random state is used.

    Args:
        dataset: items are mappings with `input_ids` and, where they differ, `labels`.
        layout: how a step is cut into ranks and micro-batches.
        seed: which order.
        start_sample: position in the global order at which the first step begins.
        steps: optimizer steps to give out.
        pin_memory: put batches into page-locked host memory, from which copies to a GPU need not be waited for.
        num_workers: processes that read ahead; 0 reads in this one.
        batching: how samples become batches.

    Attributes:
        layout: as above.
        steps: as above.

    Raises:
        ConfigError: the start or the count of steps is negative.
        DataError: the data set is empty.
    """

    def __init__(
        self,
        dataset: AnyDataset,
        layout: BatchLayout,
        *,
        seed: int,
        start_sample: int = 0,
        steps: int,
        pin_memory: bool = False,
        num_workers: int = 0,
        batching: Batching | None = None,
    ) -> None:
        if start_sample < 0 or steps < 0:
            raise ConfigError(f"start_sample and steps must be at least 0, not {start_sample} and {steps}")
        self.layout = layout
        self.steps = steps
        batching = batching if batching is not None else Batching()
        order = SampleOrder(_size(dataset), seed, batching.buckets, counts_epochs=batching.counts_epochs)
        micro_batches = _MicroBatches(order, layout, start_sample, steps)
        self._make = batching.make
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=micro_batches,
            collate_fn=batching.collate,
            pin_memory=pin_memory,
            num_workers=num_workers,
            # Forked ones would have a copy of all that is held open here, the device too.
            multiprocessing_context="spawn" if num_workers else None,
            # Its own generator: else every new iterator draws from the global one, and a resumed run, which makes
            # one more, has other dropout masks than the run that was never stopped.
            generator=torch.Generator().manual_seed(seed % 2**63),
        )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[AnyBatch]]:
        step: list[AnyBatch] = []
        for columns in self._loader:
            step.append(self._make(columns))
            if len(step) == self.layout.accumulate:
                yield step
                step = []


class _MicroBatches(Sampler[list[int]]):
    """The sample indices of this rank's micro-batches, as a batch sampler."""

    def __init__(self, order: SampleOrder, layout: BatchLayout, start_sample: int, steps: int) -> None:
        self._order = order
        self._layout = layout
        self._start_sample = start_sample
        self._steps = steps

    def __len__(self) -> int:
        return self._steps * self._layout.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        return self._order.micro_batches(self._layout, self._start_sample, self._steps)


def evaluation_batches(
    dataset: AnyDataset,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    pin_memory: bool = False,
    batching: Batching | None = None,
) -> Iterator[AnyBatch]:
    """Yield this rank's share of a data set: every sample counts exactly once over all ranks, in a fixed order.

    All ranks get the same number of batches, because a sharded model computes together, and all batches have as many
    rows, because a compiled model is compiled for one shape: where samples are lacking, rows whose labels are all -100
    fill up, and count for nothing.

    Args:
        dataset: items are mappings with `input_ids` and, where they differ, `labels`.
        batch_size: rows in a batch of one rank.
        rank: this rank.
        world_size: ranks that share the data.
        pin_memory: put batches into page-locked host memory.
        batching: how samples become batches; their order is the data set's.

    Raises:
        ConfigError: a number is too small, or the rank is not one of the world's.
        DataError: the data set is empty.
    """
    layout = BatchLayout(batch_size, 1, rank, world_size)
    batching = batching if batching is not None else Batching()
    size = _size(dataset)
    if size < 1:
        raise DataError("there is nothing to evaluate on: the data set holds no samples")
    for first in range(0, size, layout.samples_per_step):
        left = min(layout.samples_per_step, size - first)
        indices = range(first + left * rank // world_size, first + left * (rank + 1) // world_size)
        filled = [*indices, *[first] * (batch_size - len(indices))]
        columns = batching.collate(_fetch(dataset, filled))
        if len(indices) < batch_size:
            labels = (columns["labels"] if "labels" in columns else columns["input_ids"]).clone()
            labels[len(indices) :] = IGNORED_LABEL
            columns["labels"] = labels
        if pin_memory:
            columns = {name: column.pin_memory() for name, column in columns.items()}
        yield batching.make(columns)


def _size(dataset: AnyDataset) -> int:
    return len(dataset)  # type: ignore[arg-type]  # torch leaves __len__ out of Dataset


def _fetch(dataset: AnyDataset, indices: list[int]) -> list[Any]:
    fetch_many = getattr(dataset, "__getitems__", None)
    return list(fetch_many(indices)) if fetch_many is not None else [dataset[index] for index in indices]
