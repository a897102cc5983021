"""The flat buffer: tensors one behind another, dealt evenly to ranks. Pure numbers; `Bucket` gives them memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from albireo.errors import ConfigError

__all__ = ["ALIGNMENT", "Cut", "FlatLayout", "Segment", "plan_buckets"]

# Elements. A fused Adam computes the tail of a tensor by other instructions than its body, so the last bits of a step
# would depend on where a tensor is cut: at multiples of this they do not. It also aligns every dtype to 64 bytes or more.
ALIGNMENT = 64


@dataclass(frozen=True)
class Segment:
    """Where one tensor lies in a flat buffer.

    Attributes:
        shape: the tensor's.
        offset: its first element in the buffer, a multiple of `ALIGNMENT`.
    """

    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """How many elements the tensor has."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """One past its last element in the buffer."""
        return self.offset + self.numel


@dataclass(frozen=True)
class Cut:
    """The elements of one tensor that lie in one rank's partition.

    Attributes:
        segment: the tensor's number in the layout.
        start: the first of the elements in the tensor, flattened in row-major order; a multiple of `ALIGNMENT`.
        stop: one past the last.
        offset: the first of them in the partition.
    """

    segment: int
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        """How many elements there are; at least one."""
        return self.stop - self.start


@dataclass(frozen=True)
class FlatLayout:
    """Tensors one behind another, and the buffer's even partition over ranks.

    Attributes:
        segments: in the order of the tensors.
        numel: elements of the buffer: a multiple of `ALIGNMENT` x ranks.
        ranks: how many share it.
    """

    segments: tuple[Segment, ...]
    numel: int
    ranks: int

    @staticmethod
    def of(shapes: Iterable[Sequence[int]], ranks: int) -> FlatLayout:
        """Lay out tensors in their order.

        Args:
            shapes: theirs.
            ranks: how many share the buffer.

        Raises:
            ConfigError: there is no rank.
        """
        if ranks < 1:
            raise ConfigError(f"a flat buffer is shared by at least 1 rank, not by {ranks}")
        segments = []
        end = 0
        for shape in shapes:
            segment = Segment(tuple(shape), end)
            segments.append(segment)
            end = _rounded_up(segment.stop, ALIGNMENT)
        return FlatLayout(tuple(segments), _rounded_up(end, ALIGNMENT * ranks), ranks)

    @property
    def partition_numel(self) -> int:
        """Elements of one rank's partition."""
        return self.numel // self.ranks

    @property
    def waste(self) -> int:
        """Elements that belong to no tensor."""
        return self.numel - sum(segment.numel for segment in self.segments)

    def cuts(self, rank: int) -> tuple[Cut, ...]:
        """Return what lies in a rank's partition, in the buffer's order.

        Args:
            rank: whose.

        Raises:
            ConfigError: there is no such rank.
        """
        if not 0 <= rank < self.ranks:
            raise ConfigError(f"a flat buffer over {self.ranks} ranks has no partition of rank {rank}")
        first = rank * self.partition_numel
        last = first + self.partition_numel
        cuts = []
        for number, segment in enumerate(self.segments):
            start, stop = max(segment.offset, first), min(segment.stop, last)
            if start < stop:
                cuts.append(Cut(number, start - segment.offset, stop - segment.offset, start - first))
        return tuple(cuts)


def plan_buckets(numels: Sequence[int], bucket_elements: int) -> list[list[int]]:
    """Deal tensors to buckets in their order.

    Args:
        numels: how many elements each has.
        bucket_elements: a bucket takes tensors until the next would make it larger than this; a single tensor that is
            larger gets a bucket of its own.

    Returns:
        The tensors' numbers, by bucket; none is empty.

    Raises:
        ConfigError: a bucket could hold nothing.
    """
    if bucket_elements < 1:
        raise ConfigError(f"a bucket holds at least 1 element, not {bucket_elements}")
    buckets: list[list[int]] = []
    room = 0
    for number, numel in enumerate(numels):
        if not buckets or numel > room:
            buckets.append([])
            room = bucket_elements
        buckets[-1].append(number)
        room -= numel
    return buckets


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
