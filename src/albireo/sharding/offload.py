"""Gradients leave for the host while backward runs; new weights come back while others are stepped there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from albireo.device.lanes import Arrival, CopyLane
from albireo.device.pinned import host_buffer
from albireo.device.watch import WorkLabel
from albireo.optim import HostStepper, norms_of
from albireo.sharding.bucket import Bucket, Fragment
from albireo.sharding.flat_parameters import FlatParameters

__all__ = ["GradientOffload", "OffloadedStep"]

# Gradients on their way hold so much of the device's memory at most; then the device waits for the oldest of them.
_ON_THEIR_WAY_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class _Sent:
    """A gradient on the host, or on its way there."""

    host: torch.Tensor
    norm: tuple[torch.Tensor, ...]
    arrival: Arrival


class GradientOffload:
    """Carries gradients to host memory beside the computing.

    The host buffers are made once, per bucket and dtype, and used again in every step.

    Args:
        device: where the gradients come from.
        lane: on which they travel; nobody else's.
        takes: says whether a bucket's gradients are to leave, at any time; all are if None.
        takes_each: those of every micro-batch leave, and come back for the next to be added; else they wait on the device
            for the step's last.

    Attributes:
        takes_each: the same.
        on_sent: called with a bucket when some of its gradients are on their way.
    """

    def __init__(
        self,
        device: torch.device,
        lane: CopyLane,
        *,
        takes: Callable[[FlatParameters], bool] | None = None,
        takes_each: bool = False,
    ) -> None:
        self._device = device
        self._lane = lane
        self._takes = takes
        self.takes_each = takes_each
        self.on_sent: Callable[[FlatParameters], None] | None = None
        self._buffers: dict[tuple[FlatParameters, torch.dtype], torch.Tensor] = {}
        self._sent: dict[Fragment, _Sent] = {}
        # What is on its way keeps its memory until the current stream has been ordered behind the copy.
        self._under_way: deque[tuple[Arrival, int, list[torch.Tensor]]] = deque()
        self._under_way_bytes = 0

    def takes(self, bucket: FlatParameters) -> bool:
        """Return True if a bucket's gradients are to leave."""
        return self._takes is None or self._takes(bucket)

    def send(self, bucket: FlatParameters, gradients: Sequence[tuple[Fragment, torch.Tensor]]) -> None:
        """Send gradients on their way. The host does not wait for them.

        Args:
            bucket: whose.
            gradients: fragments of it, each with its gradient: 1-D, on the device, from now on nobody else's.
        """
        if not gradients:
            return
        tensors = [gradient for _, gradient in gradients]
        norms = norms_of(tensors)
        places = []
        for fragment, gradient in gradients:
            buffer = self.buffer(bucket, gradient.dtype)
            places.append(buffer[fragment.cut.offset : fragment.cut.offset + fragment.cut.numel])
        self._lane.follow()
        arrival: Arrival | None = None
        for place, gradient in zip(places, tensors, strict=True):
            label = WorkLabel("gradient out", bucket, gradient.numel() * gradient.element_size())
            arrival = self._lane.copy(place, gradient, label)
        if arrival is None:
            return
        for (fragment, _), place, norm in zip(gradients, places, norms, strict=True):
            self._sent[fragment] = _Sent(place, norm, arrival)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._under_way.append((arrival, size, tensors))
        self._under_way_bytes += size
        while self._under_way_bytes > _ON_THEIR_WAY_BYTES:
            self._settle_oldest()
        if self.on_sent is not None:
            self.on_sent(bucket)

    def settle(self) -> None:
        """Order the current stream behind all that is under way, and let its device memory go."""
        while self._under_way:
            self._settle_oldest()

    def recall(self, fragment: Fragment) -> torch.Tensor | None:
        """Bring a gradient back to the device, for more to be added to it; None if none was sent."""
        sent = self._sent.pop(fragment, None)
        if sent is None:
            return None
        sent.arrival.synchronize()
        # Whatever is sent to the same place next follows the current stream, and so comes behind this copy.
        return sent.host.to(self._device, non_blocking=True, copy=True)

    def forget(self, fragment: Fragment) -> None:
        """Forget a gradient, if one was sent."""
        sent = self._sent.pop(fragment, None)
        if sent is not None:
            sent.arrival.synchronize()

    def of(self, fragment: Fragment) -> torch.Tensor | None:
        """Return a gradient in host memory, once it is there; None if none was sent."""
        sent = self._sent.get(fragment)
        if sent is None:
            return None
        sent.arrival.synchronize()
        return sent.host

    def in_flight(self, fragment: Fragment) -> tuple[torch.Tensor, Arrival] | None:
        """Return a gradient's place in host memory, and when it is there; None if none was sent."""
        sent = self._sent.get(fragment)
        return None if sent is None else (sent.host, sent.arrival)

    def buffer(self, bucket: FlatParameters, dtype: torch.dtype) -> torch.Tensor:
        """Return where a bucket's gradients of a dtype lie on the host, laid out as its partition; 1-D, made if need be."""
        key = (bucket, dtype)
        if key not in self._buffers:
            self._buffers[key] = host_buffer(bucket.layout.partition_numel, dtype, self._device)
        return self._buffers[key]

    def norm_of(self, fragment: Fragment) -> tuple[torch.Tensor, ...]:
        """Return the norm of a gradient that was sent, in parts, on the device; see `albireo.optim.norms_of`."""
        return self._sent[fragment].norm

    def clear(self) -> None:
        """Forget all gradients; the buffers stay."""
        for sent in self._sent.values():
            # A copy that is under way would write into what the next one has written.
            sent.arrival.synchronize()
        self._sent.clear()
        self.settle()

    def release(self, bucket: FlatParameters) -> None:
        """Let a bucket's host buffers go: its gradients have been recalled, and do not leave any more."""
        if self._device.type == "cuda":
            # What was recalled is copied from them.
            torch.cuda.current_stream(self._device).synchronize()
        for key in [key for key in self._buffers if key[0] is bucket]:
            del self._buffers[key]

    def _settle_oldest(self) -> None:
        arrival, size, _ = self._under_way.popleft()
        arrival.wait()
        self._under_way_bytes -= size


class OffloadedStep:
    """Steps fragments by the host stepper, and brings new weights to the device as they are made.

    Args:
        stepper: steps the optimizer's parameters.
        buckets: whose fragments.
        device: where the weights compute.
        lane: on which new weights travel to it; nobody else's.
    """

    def __init__(self, stepper: HostStepper, buckets: Sequence[Bucket], device: torch.device, lane: CopyLane) -> None:
        self._stepper = stepper
        self._lane = lane
        self._outputs: dict[Fragment, torch.Tensor] = {}
        for bucket in buckets:
            buffer = host_buffer(bucket.layout.partition_numel, bucket.compute.dtype, device)
            for fragment in bucket.fragments:
                self._outputs[fragment] = buffer[fragment.cut.offset : fragment.cut.offset + fragment.cut.numel]

    def run(self, fragments: Iterable[Fragment], offload: GradientOffload, factor: float) -> None:
        """Step fragments whose gradients were sent, and wait until they are stepped.

        The current stream is ordered behind the copies of their weights.

        Args:
            fragments: in the order in which they are stepped.
            offload: where the gradients are.
            factor: what they are multiplied by in fp32.
        """
        stepped: list[Fragment] = []
        arrivals: list[Arrival] = []

        def bring(index: int) -> None:
            arrivals.append(self._lane.copy(stepped[index].compute, self._outputs[stepped[index]]))

        # What still reads the weights on the device comes first.
        self._lane.follow()
        ticket = self._stepper.open(factor, on_done=bring)
        with ticket:
            for fragment in fragments:
                found = offload.in_flight(fragment)
                if found is None:
                    continue
                gradient, arrival = found
                stepped.append(fragment)
                ticket.submit(fragment.master, gradient, output=self._outputs[fragment], ready=arrival.synchronize)
        ticket.wait()
        if arrivals:
            arrivals[-1].wait()
