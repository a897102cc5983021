"""Gradients on their way over ranks: added up in fp32, reduced bucket by bucket while backward runs.

All ranks call the same collectives in the same order: a bucket is reduced after those before it, whatever order they
fill in. `finish` ends a backward; it must be called on all ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import nn

from albireo.distributed import World
from albireo.distributed.collectives import Transfer, all_reduce, reduce_scatter
from albireo.errors import AlbireoError
from albireo.sharding.bucket import Fragment
from albireo.sharding.flat_parameters import FlatParameters
from albireo.sharding.gradients import Gradients
from albireo.sharding.offload import GradientOffload

__all__ = ["ReducedGradients"]

# Reductions under way at a time: one is sent while the next bucket fills. Each holds a bucket in fp32.
_UNDER_WAY = 2


class _Filling:
    """What one bucket's gradients are doing."""

    def __init__(self, bucket: FlatParameters) -> None:
        self.bucket = bucket
        # The segments that are waited for before the bucket is sent: those that any rank used in the step before.
        self.expected = [True] * len(bucket.parameters)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        # Sums of this rank, in fp32, and the segments that they hold.
        self.buffer: torch.Tensor | None = None
        self.valid = [False] * len(self.bucket.parameters)
        # The segments whose gradients came in this backward.
        self.arrived = [False] * len(self.bucket.parameters)
        # This rank's partition of the means over ranks, in fp32.
        self.reduced: torch.Tensor | None = None

    @property
    def is_expected(self) -> bool:
        """True if a gradient of any segment is waited for; the same on all ranks."""
        return any(self.expected)

    @property
    def complete(self) -> bool:
        """True if all that is waited for has come."""
        return all(came or not wanted for came, wanted in zip(self.arrived, self.expected, strict=True))

    def add(self, number: int, gradient: torch.Tensor) -> None:
        """Add to the fp32 buffer."""
        if self.buffer is None:
            self.buffer = torch.empty(self.bucket.layout.numel, dtype=torch.float32, device=gradient.device)
        segment = self.bucket.layout.segments[number]
        place = self.buffer[segment.offset : segment.stop].view(segment.shape)
        if self.valid[number]:
            place.add_(gradient)
        else:
            place.copy_(gradient)
            self.valid[number] = True
        self.arrived[number] = True

    def take_buffer(self) -> torch.Tensor:
        """Return the buffer, with zeros for what never came, and begin another."""
        buffer, layout = self.buffer, self.bucket.layout
        if buffer is None:
            buffer = torch.zeros(layout.numel, dtype=torch.float32, device=self.bucket.compute.device)
        else:
            for segment, valid in zip(layout.segments, self.valid, strict=True):
                if not valid:
                    buffer[segment.offset : segment.stop].zero_()
        self.buffer = None
        self.valid = [False] * len(self.valid)
        return buffer


class ReducedGradients(Gradients):
    """Gradients that are averaged over ranks in fp32, of which each rank keeps its partition.

    Args:
        buckets: whose parameters.
        world: the ranks.
        scatter: each rank gets the sums of its partition alone (stage 2), or all sums, of which it keeps its own.
        overlap: reduce while backward runs; else each reduction is waited for.
        paced: buckets are sent when `send_until` says so, and not as soon as they are full.
        offload: see the base class.
    """

    def __init__(
        self,
        buckets: Sequence[FlatParameters],
        world: World,
        *,
        scatter: bool,
        overlap: bool,
        paced: bool = False,
        offload: GradientOffload | None = None,
    ) -> None:
        self._world = world
        self._scatter = scatter
        self._paced = paced
        self._most_under_way = _UNDER_WAY if overlap else 0
        self._fillings = [_Filling(bucket) for bucket in buckets]
        self._places = {p: number for number, bucket in enumerate(buckets) for p in bucket.parameters}
        self._next = 0
        self._kept_back = False
        # A rank gave up in this step, and all know.
        self._void = False
        self._under_way: deque[tuple[_Filling, Transfer, torch.Tensor]] = deque()
        # Which parameters had a gradient since the last `clear`: on this rank, and on any.
        self._touched: dict[nn.Parameter, bool] = dict.fromkeys(self._places, False)
        self._agreed: set[nn.Parameter] = set()
        super().__init__(buckets, offload)

    def take(self, bucket: FlatParameters, number: int, gradient: torch.Tensor) -> None:
        """See the base class.

        A gradient that was not waited for, or that comes again when its bucket has been sent (as reentrant
        checkpointing has it), goes into a new buffer, which `finish` sends.
        """
        parameter = bucket.parameters[number]
        self._fillings[self._places[parameter]].add(number, gradient)
        self._touched[parameter] = True
        if self._reducing and not self._paced:
            self._send_complete()

    def send_until(self, number: int) -> None:
        """Send the buckets below a number, in their order, whether all of their gradients have come or not.

        Where other collectives are called between reductions, the moments must be the same on all ranks, and no
        function of what a rank has used: a gradient that comes later goes into a new buffer, which `finish` sends.

        Args:
            number: one past the last bucket.
        """
        while self._reducing and self._next < number:
            self._send_next()

    @property
    def has_unsent(self) -> bool:
        """See the base class."""
        return self._kept_back

    def finish(self) -> None:
        """See the base class; from then on this rank knows which parameters any rank has a gradient of."""
        if self._reducing:
            self._send_expected()
            late = self._agree(abandoned=False)
            for filling, is_late in zip(self._fillings, late, strict=True):
                if is_late:
                    self._send(filling)
            self._settle(0)
            for filling in self._fillings:
                self._offload(filling)
            self._forget_unused()
        self._kept_back = not self._reducing
        self._end_backward()

    def abandon(self) -> None:
        """See the base class."""
        if self._reducing and not self._void:
            # The others are waiting for these collectives; they learn in the last one that the step is void.
            self._send_expected()
            # The failure that is under way says more than this one.
            with suppress(AlbireoError):
                self._agree(abandoned=True)
        self.clear()

    def of(self, fragment: Fragment) -> torch.Tensor | None:
        """See the base class."""
        if fragment.parameter not in self._agreed:
            return None
        reduced = self._fillings[self._places[fragment.parameter]].reduced
        if reduced is None or self._is_offloaded(fragment):
            return None if self.offload is None else self.offload.of(fragment)
        return reduced[fragment.cut.offset : fragment.cut.offset + fragment.cut.numel]

    def send_kept(self) -> None:
        """See the base class."""
        for filling in self._fillings:
            self._offload(filling)
        if self.offload is not None:
            self.offload.settle()

    def _keep(self, fragment: Fragment, gradient: torch.Tensor) -> None:
        filling = self._fillings[self._places[fragment.parameter]]
        if filling.reduced is None:
            filling.reduced = gradient.new_zeros(filling.bucket.layout.partition_numel)
        filling.reduced[fragment.cut.offset : fragment.cut.offset + fragment.cut.numel].copy_(gradient)

    def kept_bytes(self, bucket: FlatParameters) -> int:
        """See the base class."""
        reduced = [filling.reduced for filling in self._fillings if filling.bucket is bucket]
        return sum(part.numel() * part.element_size() for part in reduced if part is not None)

    def clear(self) -> None:
        """See the base class."""
        # A collective under way still writes into its tensors.
        self._settle(0)
        if self.offload is not None:
            self.offload.clear()
        for filling in self._fillings:
            if self._agreed:
                filling.expected = [parameter in self._agreed for parameter in filling.bucket.parameters]
            filling.forget()
        self._next = 0
        self._kept_back = self._void = False
        self._touched = dict.fromkeys(self._touched, False)
        self._agreed = set()
        self._factor = None

    def _send_complete(self) -> None:
        """Send the next buckets, as far as all that is waited for has come."""
        while self._next < len(self._fillings) and self._fillings[self._next].complete:
            self._send_next()

    def _send_expected(self) -> None:
        while self._next < len(self._fillings):
            self._send_next()

    def _send_next(self) -> None:
        filling = self._fillings[self._next]
        self._next += 1
        # What nobody waits for is nowhere sent now: `finish` sends it, should it have come on any rank.
        if filling.is_expected:
            self._send(filling)

    def _send(self, filling: _Filling) -> None:
        buffer = filling.take_buffer()
        layout = filling.bucket.layout
        if self._scatter:
            result = buffer.new_empty(layout.partition_numel)
            transfer = reduce_scatter(result, buffer)
        else:
            transfer = all_reduce(buffer)
            first = self._world.rank * layout.partition_numel
            result = buffer[first : first + layout.partition_numel]
        self._under_way.append((filling, transfer, result))
        self._settle(self._most_under_way)

    def _settle(self, keep: int) -> None:
        """Wait for the oldest reductions, and add what they brought to the partitions."""
        while len(self._under_way) > keep:
            filling, transfer, result = self._under_way.popleft()
            transfer.wait()
            mean = 1.0 / self._world.world_size
            if filling.reduced is None:
                # Multiplied into memory of its own size: with an all-reduce, the result is a part of a whole buffer.
                filling.reduced = result.mul_(mean) if self._scatter else result * mean
            else:
                filling.reduced.add_(result, alpha=mean)
            # With an all-reduce it still holds the whole buffer.
            del transfer, result
            self._offload(filling)

    def _offload(self, filling: _Filling) -> None:
        """Take what is reduced to the host, added to what is there of the same step."""
        offload = self._offload_of(filling.bucket)
        if offload is None or filling.reduced is None:
            return
        parts = []
        for fragment in filling.bucket.fragments:
            gradient = filling.reduced[fragment.cut.offset : fragment.cut.offset + fragment.cut.numel]
            earlier = offload.recall(fragment)
            parts.append((fragment, gradient if earlier is None else earlier.add_(gradient)))
        offload.send(filling.bucket, parts)
        filling.reduced = None

    def _forget_unused(self) -> None:
        """Forget what went to the host of parameters that no rank has a gradient of: zeros."""
        if self.offload is None:
            return
        for filling in self._fillings:
            for fragment in filling.bucket.fragments:
                if fragment.parameter not in self._agreed:
                    self.offload.forget(fragment)
        self.offload.settle()

    def _agree(self, *, abandoned: bool) -> list[bool]:
        """Learn from all ranks what was used, and which buckets still hold something on any of them.

        Raises:
            AlbireoError: a rank gave up.
        """
        late = [filling.buffer is not None for filling in self._fillings]
        numbers = [abandoned, *late, *self._touched.values()]
        flags = self._world.sum_in_place(torch.tensor(numbers, dtype=torch.float32)).tolist()
        if flags[0] > 0:
            self._void = True
            raise AlbireoError("another rank could not finish this step, so no rank steps: its own message says why")
        self._agreed = {p for p, ranks in zip(self._touched, flags[1 + len(late) :], strict=True) if ranks > 0}
        return [ranks > 0 for ranks in flags[1 : 1 + len(late)]]

    def _end_backward(self) -> None:
        self._next = 0
        for filling in self._fillings:
            filling.arrived = [False] * len(filling.arrived)
