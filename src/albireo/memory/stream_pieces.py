"""The ring through which states are streamed, and how a chunk's partition is cut into pieces for it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from albireo.sharding import Cut

__all__ = ["PIECE_STEP", "SLOTS", "Part", "Piece", "pieces_of", "ring_bytes", "slot_elements"]

# Elements. A tensor is cut at multiples of this from its start alone, so that no part but its last has a tail: torch's
# kernel takes so many at a time, and computes tails by other instructions.
PIECE_STEP = 64 * 1024

# Elements of a slot: large enough for the bus's full pace, small enough that a ring takes little.
_SLOT_ELEMENTS = 8 * 2**20
# One is filled, one is stepped, one is emptied.
SLOTS = 3
# Masters, two moments and the gradient in fp32; the gradient, and later the new weight, in 16 bits.
_SLOT_BYTES = 18


def slot_elements(largest: int) -> int:
    """Return the elements of a slot.

    Args:
        largest: elements of the largest partition that is streamed.
    """
    return max(PIECE_STEP, min(_SLOT_ELEMENTS, largest))


def ring_bytes(largest: int) -> int:
    """Return what the ring takes on the device.

    Args:
        largest: elements of the largest partition that is streamed.
    """
    return SLOTS * _SLOT_BYTES * slot_elements(largest)


@dataclass(frozen=True)
class Part:
    """Some elements of one fragment.

    Attributes:
        fragment: its number in the chunk.
        begin: in the partition.
        stop: likewise.
    """

    fragment: int
    begin: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """A range of a partition that is copied at once: from its first part's beginning to its last one's end.

    Attributes:
        parts: in order, at least one.
    """

    parts: tuple[Part, ...]

    @property
    def begin(self) -> int:
        """The first element."""
        return self.parts[0].begin

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.parts[-1].stop

    @property
    def numel(self) -> int:
        """How many elements are copied."""
        return self.stop - self.begin


def pieces_of(cuts: Sequence[Cut], numbers: Sequence[int], most: int, *, step: int = PIECE_STEP) -> list[Piece]:
    """Cut fragments into pieces.

    Args:
        cuts: where the chunk's fragments lie in the partition, in its order.
        numbers: those that are to be stepped, in order.
        most: elements of a slot, at least `step`.
        step: where a fragment may be cut: at multiples of this from its start.

    Raises:
        ValueError: a slot is smaller than the step.
    """
    if most < step:
        raise ValueError(f"a slot of {most} elements is smaller than {step}, at multiples of which tensors are cut")
    pieces: list[Piece] = []
    parts: list[Part] = []
    for number in numbers:
        first, end = cuts[number].offset, cuts[number].offset + cuts[number].numel
        while first < end:
            room = most - (first - parts[0].begin if parts else 0)
            stop = end if end - first <= room else first + max(room, 0) // step * step
            if stop > first:
                parts.append(Part(number, first, stop))
                first = stop
            if first < end:
                pieces.append(Piece(tuple(parts)))
                parts = []
    if parts:
        pieces.append(Piece(tuple(parts)))
    return pieces
