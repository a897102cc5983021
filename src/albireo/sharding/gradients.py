"""Gradients on their way from autograd to the fragments that are stepped: taken, added up, reduced over ranks.

All ranks call the same collectives in the same order: a bucket is reduced after those before it, whatever order they
fill in. `finish` ends a backward; it must be called on all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import nn

from albireo.distributed import World
from albireo.distributed.collectives import Transfer, all_reduce, reduce_scatter
from albireo.errors import AlbireoError, ConfigError
from albireo.optim import sum_of_squares
from albireo.sharding.bucket import Bucket, Fragment
from albireo.sharding.offload import GradientOffload

__all__ = ["Gradients", "LocalGradients", "ReducedGradients"]

# Reductions under way at a time: one is sent while the next bucket fills. Each holds a bucket in fp32.
_UNDER_WAY = 2


class Gradients(ABC):
    """Takes each parameter's gradient when it is complete, and keeps what this rank steps.

    Args:
        buckets: whose parameters, in the order in which they are to be reduced.
        offload: takes gradients to the host as soon as they are complete; None keeps them on the device.

    Attributes:
        buckets: the same.
        offload: the same.
    """

    def __init__(self, buckets: Sequence[Bucket], offload: GradientOffload | None = None) -> None:
        self.buckets = tuple(buckets)
        self.offload = offload
        self._taking = False
        self._more_to_come = False
        self._reducing = True
        self._factor: torch.Tensor | None = None
        for bucket in self.buckets:
            for number, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(self._hook(bucket, number))  # type: ignore[no-untyped-call]

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The one place for a backward: what comes outside of it would not be finished, and is refused."""
        if self.is_scaled:
            raise RuntimeError(
                "backward was called on gradients that have been clipped: clip once, after the last backward of a step"
            )
        self._taking = True
        try:
            yield
        finally:
            self._taking = False

    @contextmanager
    def kept_local(self) -> Iterator[None]:
        """Within it, gradients are added up on this rank, and nothing is sent."""
        before, self._reducing = self._reducing, False
        try:
            yield
        finally:
            self._reducing = before

    @contextmanager
    def more_to_come(self) -> Iterator[None]:
        """Within it, a backward is not the step's last: what it leaves is not complete yet."""
        before, self._more_to_come = self._more_to_come, True
        try:
            yield
        finally:
            self._more_to_come = before

    @property
    def has_unsent(self) -> bool:
        """True if gradients were kept local, and no backward has sent them since; the same on all ranks."""
        return False

    @abstractmethod
    def finish(self) -> None:
        """End a backward, and send what was kept local unless it is still to be; called on all ranks."""

    @abstractmethod
    def abandon(self) -> None:
        """End a backward that failed on this rank, so that it fails on all, and forget all gradients."""

    @abstractmethod
    def take(self, bucket: Bucket, number: int, gradient: torch.Tensor) -> None:
        """Add a parameter's gradient.

        Args:
            bucket: where the parameter is.
            number: its segment.
            gradient: of its shape; from now on nobody else's.
        """

    @abstractmethod
    def of(self, fragment: Fragment) -> torch.Tensor | None:
        """Return a fragment's gradient as it is kept, 1-D, in fp32 or narrower; None if no rank has one."""

    def has(self, fragment: Fragment) -> bool:
        """Return True if a fragment is to be stepped; waits for no copy."""
        if self.offload is not None and self.offload.in_flight(fragment) is not None:
            return True
        return self.of(fragment) is not None

    @abstractmethod
    def clear(self) -> None:
        """Forget all gradients."""

    @property
    def is_scaled(self) -> bool:
        """True once `scale` has been called."""
        return self._factor is not None

    @property
    def factor(self) -> torch.Tensor | None:
        """What `scale` was given, and gradients that `is_to_be_cast` still are to be multiplied by."""
        return self._factor

    def scale(self, factor: torch.Tensor) -> None:
        """Multiply all gradients. Those that are to be cast are left as they are: they are multiplied in fp32, then.

        Args:
            factor: an fp32 scalar on the device.
        """
        self._factor = factor if self._factor is None else self._factor * factor
        ready = [gradient for _, gradient in self.kept() if not self.is_to_be_cast(gradient)]
        if ready:
            torch._foreach_mul_(ready, factor)

    def is_to_be_cast(self, gradient: torch.Tensor) -> bool:
        """Return True if a gradient, as it is kept, is not what is to be stepped: it is narrow, or it was offloaded."""
        return self.offload is not None or gradient.dtype != torch.float32

    def sum_of_squares(self) -> torch.Tensor:
        """Return the sum of squares of this rank's gradients as they are kept, an fp64 scalar."""
        if self.offload is not None:
            fragments = (fragment for bucket in self.buckets for fragment in bucket.fragments)
            return self.offload.sum_of_squares(fragments)
        return sum_of_squares([gradient for _, gradient in self.kept()])

    def kept(self) -> Iterator[tuple[Fragment, torch.Tensor]]:
        """Yield each fragment that has a gradient, and the gradient as it is kept, in the buckets' order."""
        for bucket in self.buckets:
            for fragment in bucket.fragments:
                gradient = self.of(fragment)
                if gradient is not None:
                    yield fragment, gradient

    def cast(self, gradients: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
        """Cast gradients to fp32, and scale them as the others have been.

        Args:
            gradients: as they are kept.
            out: fp32 tensors of the same shapes, on the same device.
        """
        torch._foreach_copy_(list(out), list(gradients))
        if self._factor is not None and out:
            torch._foreach_mul_(list(out), self._factor.to(out[0].device))

    def _hook(self, bucket: Bucket, number: int) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                return
            if not self._taking:
                raise RuntimeError(
                    "sharded gradients are taken by booster.backward(loss, optimizer), not loss.backward()"
                )
            if gradient.layout != torch.strided:
                raise ConfigError("sharding needs dense gradients: make the embedding with sparse=False")
            with torch.no_grad():
                self.take(bucket, number, gradient.detach())

        return take


class LocalGradients(Gradients):
    """Gradients of a rank that is alone: each stays in the memory that autograd put it in.

    A single micro-batch's 16-bit gradients stay 16-bit, for their fp32 values are the same; a second one's are added up
    in fp32.
    """

    def __init__(self, buckets: Sequence[Bucket], offload: GradientOffload | None = None) -> None:
        super().__init__(buckets, offload)
        self._kept: dict[nn.Parameter, torch.Tensor] = {}
        # Alone, each parameter is one fragment.
        self._fragments = {fragment.parameter: fragment for bucket in buckets for fragment in bucket.fragments}

    def take(self, bucket: Bucket, number: int, gradient: torch.Tensor) -> None:
        """See the base class."""
        parameter = bucket.parameters[number]
        fragment = self._fragments[parameter]
        kept = self._kept.pop(parameter, None)
        if kept is None and self.offload is not None:
            kept = self.offload.recall(fragment)
        total = gradient.reshape(-1)
        if kept is not None:
            total = (kept if kept.dtype == torch.float32 else kept.float()).add_(total)
        if self.offload is not None and self._reducing and not self._more_to_come:
            self.offload.send(fragment, total)
        else:
            self._kept[parameter] = total

    @property
    def has_unsent(self) -> bool:
        """See the base class."""
        return self.offload is not None and bool(self._kept)

    def finish(self) -> None:
        """See the base class: there are no ranks, but what came earlier in the step and not again goes to the host."""
        if self.offload is not None and self._reducing and not self._more_to_come:
            for parameter, gradient in self._kept.items():
                self.offload.send(self._fragments[parameter], gradient)
            self._kept.clear()

    def abandon(self) -> None:
        """See the base class."""
        self.clear()

    def of(self, fragment: Fragment) -> torch.Tensor | None:
        """See the base class."""
        if self.offload is not None and fragment.parameter not in self._kept:
            return self.offload.of(fragment)
        return self._kept.get(fragment.parameter)

    def clear(self) -> None:
        """See the base class."""
        self._kept.clear()
        if self.offload is not None:
            self.offload.clear()
        self._factor = None


class _Filling:
    """What one bucket's gradients are doing."""

    def __init__(self, bucket: Bucket) -> None:
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
        offload: see the base class.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        world: World,
        *,
        scatter: bool,
        overlap: bool,
        offload: GradientOffload | None = None,
    ) -> None:
        self._world = world
        self._scatter = scatter
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

    def take(self, bucket: Bucket, number: int, gradient: torch.Tensor) -> None:
        """See the base class.

        A gradient that was not waited for, or that comes again when its bucket has been sent (as reentrant
        checkpointing has it), goes into a new buffer, which `finish` sends.
        """
        parameter = bucket.parameters[number]
        self._fillings[self._places[parameter]].add(number, gradient)
        self._touched[parameter] = True
        if self._reducing:
            self._send_complete()

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
            if not self._more_to_come:
                self._offload_all()
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
        if reduced is None:
            return None if self.offload is None else self.offload.of(fragment)
        return reduced[fragment.cut.offset : fragment.cut.offset + fragment.cut.numel]

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

    def _offload_all(self) -> None:
        """Take what is reduced to the host, added to what is there of the same step."""
        for filling in self._fillings if self.offload is not None else ():
            if self.offload is None or filling.reduced is None:
                continue
            for fragment in filling.bucket.fragments:
                gradient = filling.reduced[fragment.cut.offset : fragment.cut.offset + fragment.cut.numel]
                earlier = self.offload.recall(fragment)
                if fragment.parameter in self._agreed:
                    self.offload.send(fragment, gradient if earlier is None else earlier.add_(gradient))
            filling.reduced = None

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
