"""What the ways of gradients and the step of a part ask of parameters in a flat buffer, wherever its memory is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from albireo.distributed.collectives import Transfer
from albireo.sharding.bucket import Fragment
from albireo.sharding.flat import FlatLayout

__all__ = ["FlatParameters"]


class FlatParameters(Protocol):
    """Parameters in one flat buffer, of which each rank owns a part in fp32."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The parameters, in the order of the segments."""

    @property
    def layout(self) -> FlatLayout:
        """Where each lies in the buffer."""

    @property
    def compute(self) -> torch.Tensor:
        """The buffer that computes, 1-D [layout.numel]."""

    @property
    def master(self) -> torch.Tensor | None:
        """This rank's part in fp32, 1-D; None where it is kept in halves."""

    @property
    def rest(self) -> torch.Tensor | None:
        """What this rank's part of `compute` lacks where fp32 weights are kept in halves; else None."""

    @property
    def fragments(self) -> Sequence[Fragment]:
        """This rank's parts of parameters, in the order of the segments."""

    def joined(self) -> AbstractContextManager[None]:
        """Have masters that are kept in halves in memory, for an optimizer to step."""

    def publish(self, *, is_cast: bool = False) -> Transfer:
        """Cast this rank's fp32 weights to what computes, and see to it that all ranks get them.

        Args:
            is_cast: the first has been done.
        """

    def check_untouched(self) -> None:
        """Refuse weights that somebody else has changed."""
