"""What a save needs of the other ranks: their number, and a barrier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["OneRank", "Ranks"]


class Ranks(Protocol):
    """The ranks that save together. They must all see one filesystem."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        ...

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        ...


@dataclass(frozen=True)
class OneRank:
    """A process on its own."""

    rank: int = 0
    world_size: int = 1

    def barrier(self) -> None:
        """Return at once: there is nobody to wait for."""
