"""Samples of like length near one another, so that little of a batch is padding. Pure.

Who trains on what must not hang on how a step is cut up: the order is one stream over all samples, a function of the
seed, the lengths and the size of a bucket alone, as without buckets. Within an epoch's permutation, samples are sorted
by length in pools of many buckets; each pool is cut into buckets, and the buckets of all pools are shuffled. Buckets
begin at multiples of their size in the endless stream, so that steps of that size are whole buckets in every epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from albireo.data.mixing import random_bits, random_key
from albireo.errors import ConfigError, DataError

__all__ = ["Buckets"]

_POOL_BUCKETS = 64
# Apart from the key of the permutation itself.
_SHUFFLE = 1


@dataclass(frozen=True, eq=False)
class Buckets:
    """How long samples are, and how many of like length follow one another.

    Attributes:
        lengths: of each sample, int64 [samples].
        size: samples in a bucket; 1 leaves the order as it is.

    Raises:
        ConfigError: the size is below 1.
        DataError: there are no samples.
    """

    lengths: NDArray[np.int64]
    size: int

    def __post_init__(self) -> None:
        """Refuse what has no order."""
        if self.size < 1:
            raise ConfigError(f"a bucket holds at least 1 sample, not {self.size}")
        if self.lengths.ndim != 1 or not len(self.lengths):
            raise DataError("there are no samples to put into buckets")

    def arranged(self, permutation: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
        """Return an epoch's permutation, rearranged.

        Args:
            permutation: of all samples, int64 [samples].
            seed: decides the order of buckets.
            epoch: from 0.

        Returns:
            A permutation of the same samples. Those before the first multiple of the size in the stream, and those after
            the last, stay as they are: they share their buckets with the epochs beside.
        """
        samples = len(permutation)
        lead = -(epoch * samples) % self.size
        whole = max(0, samples - lead) // self.size
        if self.size == 1 or whole < 2:
            return permutation
        middle = permutation[lead : lead + whole * self.size]
        sorted_pools = []
        for first in range(0, len(middle), _POOL_BUCKETS * self.size):
            pool = middle[first : first + _POOL_BUCKETS * self.size]
            sorted_pools.append(pool[np.argsort(self.lengths[pool], kind="stable")])
        buckets = np.concatenate(sorted_pools).reshape(whole, self.size)
        keys = random_bits(random_key(seed, epoch, _SHUFFLE), np.arange(whole, dtype=np.uint64))
        shuffled = buckets[np.argsort(keys)].reshape(-1)
        return np.concatenate([permutation[:lead], shuffled, permutation[lead + len(middle) :]])

    def by_length(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the samples of one step from short to long, so that each of its micro-batches is of like lengths.

        Args:
            samples: int64 [any number]; equal lengths keep their order.
        """
        return samples[np.argsort(self.lengths[samples], kind="stable")]
