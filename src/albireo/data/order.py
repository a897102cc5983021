"""The global order of samples, as a pure function of the seed.

The order is one endless stream: a permutation of the data set, then another one, and so on. A position in training is
one whole number, the count of samples that were taken from the stream. Step t of a run takes the next
`samples_per_step` of them, wherever an epoch ends, so shapes never change; ranks and micro-batches only cut that piece
up. So any number of ranks that takes as many samples in a step takes the same ones, and a run goes on at any world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from albireo.data.buckets import Buckets
from albireo.data.mixing import random_bits, random_key
from albireo.errors import ConfigError, DataError

__all__ = ["BatchLayout", "SampleOrder", "epoch_of", "epoch_permutation", "samples_at", "steps_for"]


@dataclass(frozen=True)
class BatchLayout:
    """How the samples of one optimizer step are cut up.

    Attributes:
        batch_size: samples in one micro-batch of one rank.
        accumulate: micro-batches of one rank in a step.
        rank: this rank, from 0.
        world_size: ranks that share the data.

    Raises:
        ConfigError: a number is too small, or the rank is not one of the world's.
    """

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "world_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank must lie in 0..{self.world_size - 1} at world size {self.world_size}: {self.rank}")

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step, over all ranks and micro-batches."""
        return self.batch_size * self.accumulate * self.world_size

    def offset(self, micro_batch: int) -> int:
        """Where this rank's micro-batch begins, counted from the first sample of the step."""
        return (micro_batch * self.world_size + self.rank) * self.batch_size


def epoch_permutation(dataset_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of one epoch, a permutation of 0..dataset_size-1.

    Raises:
        DataError: the data set is empty.
    """
    if dataset_size < 1:
        raise DataError("the data set holds no samples: nothing can be taken from it")
    # The keys all differ, so that the order does not hang on how a version of NumPy sorts equal ones.
    keys = random_bits(random_key(seed, epoch), np.arange(dataset_size, dtype=np.uint64))
    return np.argsort(keys).astype(np.int64, copy=False)


class SampleOrder:
    """The endless stream of samples of one data set, with the permutation in use at hand.

    Args:
        dataset_size: samples in the data set.
        seed: which stream; the same seed gives the same stream.
        buckets: puts samples of like length near one another; None: all in random order.
        counts_epochs: a sample's index is that in the data set plus the set's size times the epoch.

    Raises:
        DataError: the data set is empty, or the buckets are another data set's.
    """

    def __init__(
        self, dataset_size: int, seed: int, buckets: Buckets | None = None, *, counts_epochs: bool = False
    ) -> None:
        if buckets is not None and len(buckets.lengths) != dataset_size:
            raise DataError(f"there are lengths of {len(buckets.lengths)} samples, and {dataset_size} samples")
        self.dataset_size = dataset_size
        self.seed = seed
        self._buckets = buckets
        self._counts_epochs = counts_epochs
        self._epoch = 0
        self._permutation = self._arranged(0)

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the samples at positions start..start+count-1 of the stream.

        Raises:
            ConfigError: the start or the count is negative.
        """
        if start < 0 or count < 0:
            raise ConfigError(f"a position in the data and a count are at least 0, not {start} and {count}")
        taken = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, inside = divmod(start + filled, self.dataset_size)
            piece = self._of_epoch(epoch)[inside : inside + count - filled]
            taken[filled : filled + len(piece)] = piece + (epoch * self.dataset_size if self._counts_epochs else 0)
            filled += len(piece)
        return taken

    def micro_batches(self, layout: BatchLayout, start: int, steps: int) -> Iterator[list[int]]:
        """Yield the sample indices of each micro-batch of one rank, `layout.accumulate` of them a step.

        With buckets, a step's samples are dealt from short to long, so that each micro-batch is of like lengths; which
        samples a step has does not hang on how it is cut up.

        Args:
            layout: how a step is cut up.
            start: the global position at which the first step begins.
            steps: optimizer steps to give out.
        """
        for step in range(steps):
            first = start + step * layout.samples_per_step
            if self._buckets is None:
                for micro_batch in range(layout.accumulate):
                    yield self.take(first + layout.offset(micro_batch), layout.batch_size).tolist()
                continue
            samples = self._buckets.by_length(self.take(first, layout.samples_per_step))
            for micro_batch in range(layout.accumulate):
                offset = layout.offset(micro_batch)
                yield samples[offset : offset + layout.batch_size].tolist()

    def _of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._permutation = self._arranged(epoch)
            self._epoch = epoch
        return self._permutation

    def _arranged(self, epoch: int) -> NDArray[np.int64]:
        permutation = epoch_permutation(self.dataset_size, self.seed, epoch)
        return permutation if self._buckets is None else self._buckets.arranged(permutation, self.seed, epoch)


def samples_at(start: int, count: int, dataset_size: int, seed: int) -> NDArray[np.int64]:
    """Return the samples at positions start..start+count-1 of the global order, int64 [count].

    Raises:
        ConfigError: the start or the count is negative.
        DataError: the data set is empty.
    """
    return SampleOrder(dataset_size, seed).take(start, count)


def epoch_of(position: int, dataset_size: int) -> int:
    """Return which epoch, from 0, the sample at a global position belongs to."""
    return position // dataset_size


def steps_for(epochs: float, dataset_size: int, samples_per_step: int) -> int:
    """Return the optimizer steps in which every sample is taken `epochs` times at least; part steps count as whole.

    Raises:
        ConfigError: a number is not above 0.
    """
    if not 0 < epochs < math.inf or dataset_size < 1 or samples_per_step < 1:
        raise ConfigError(
            f"epochs, samples and samples a step must be above 0, not {epochs}, {dataset_size} and {samples_per_step}"
        )
    return math.ceil(epochs * dataset_size / samples_per_step)
