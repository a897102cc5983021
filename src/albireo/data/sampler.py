"""Which samples of a user's own data set a rank sees, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DistributedSampler

__all__ = ["EpochSampler"]


class EpochSampler(DistributedSampler[Any]):
    """torch's DistributedSampler, which goes on to the next epoch by itself.

    torch's own gives every epoch the same order unless `set_epoch` is called before each. Here that call still decides,
    and without it each pass over the data is an epoch of its own. All ranks must begin as many passes.

    Where ranks do not share the samples out evenly, the first samples come twice in an epoch, or with `drop_last` the
    last ones not at all, as torch has it.
    """

    _begun = False

    def __iter__(self) -> Iterator[Any]:
        if self._begun:
            super().set_epoch(self.epoch + 1)
        self._begun = True
        return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is.

        Args:
            epoch: its number; together with the seed it makes the order.
        """
        super().set_epoch(epoch)
        self._begun = False
