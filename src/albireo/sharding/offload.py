"""Gradients leave for the host while backward runs; new weights come back while others are stepped there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from albireo.device.pinned import host_buffer
from albireo.optim import HostStepper, sum_of_squares
from albireo.sharding.bucket import Bucket, Fragment

__all__ = ["GradientOffload", "OffloadedStep"]


@dataclass(frozen=True, eq=False)
class _Sent:
    """A gradient on the host, or on its way there."""

    host: torch.Tensor
    squares: torch.Tensor
    arrived: torch.cuda.Event | None


class GradientOffload:
    """Carries gradients to host memory, on a stream of its own.

    The host buffers are made once, per bucket and dtype, and used again in every step.

    Args:
        buckets: whose fragments.
        device: where the gradients come from.
    """

    def __init__(self, buckets: Sequence[Bucket], device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._bucket_of = {fragment: bucket for bucket in buckets for fragment in bucket.fragments}
        self._buffers: dict[tuple[Bucket, torch.dtype], torch.Tensor] = {}
        self._sent: dict[Fragment, _Sent] = {}

    def send(self, fragment: Fragment, gradient: torch.Tensor) -> None:
        """Send a gradient on its way. The host does not wait for it.

        Args:
            fragment: whose.
            gradient: 1-D, on the device; it may be let go of at once.
        """
        bucket = self._bucket_of[fragment]
        key = (bucket, gradient.dtype)
        if key not in self._buffers:
            self._buffers[key] = host_buffer(bucket.layout.partition_numel, gradient.dtype, self._device)
        host = self._buffers[key][fragment.cut.offset : fragment.cut.offset + fragment.cut.numel]
        squares = sum_of_squares([gradient])
        arrived: torch.cuda.Event | None = None
        if self._stream is None:
            host.copy_(gradient)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                host.copy_(gradient, non_blocking=True)
                arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
                arrived.record(self._stream)
            # Its memory must not be given to others of the current stream before it has been read.
            gradient.record_stream(self._stream)
        self._sent[fragment] = _Sent(host, squares, arrived)

    def recall(self, fragment: Fragment) -> torch.Tensor | None:
        """Bring a gradient back to the device in fp32, for more to be added to it; None if none was sent."""
        gradient = self.of(fragment)
        if gradient is None:
            return None
        del self._sent[fragment]
        return gradient.to(self._device, dtype=torch.float32)

    def of(self, fragment: Fragment) -> torch.Tensor | None:
        """Return a gradient in host memory, once it is there; None if none was sent."""
        sent = self._sent.get(fragment)
        if sent is None:
            return None
        if sent.arrived is not None:
            sent.arrived.synchronize()
        return sent.host

    def in_flight(self, fragment: Fragment) -> tuple[torch.Tensor, Callable[[], object] | None] | None:
        """Return a gradient's place in host memory, and what waits until it is there; None if none was sent."""
        sent = self._sent.get(fragment)
        if sent is None:
            return None
        return sent.host, None if sent.arrived is None else sent.arrived.synchronize

    def sum_of_squares(self, fragments: Iterable[Fragment]) -> torch.Tensor:
        """Return the sum of squares of the gradients that were sent, an fp64 scalar on the device.

        Args:
            fragments: in the order in which they are added up.
        """
        parts = [self._sent[fragment].squares for fragment in fragments if fragment in self._sent]
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)

    def clear(self) -> None:
        """Forget all gradients; the buffers stay."""
        for sent in self._sent.values():
            # A copy that is under way would write into what the next one has written.
            if sent.arrived is not None:
                sent.arrived.synchronize()
        self._sent.clear()


class OffloadedStep:
    """Steps fragments by the host stepper, and brings new weights to the device as they are made.

    Args:
        stepper: steps the optimizer's parameters.
        buckets: whose fragments.
        device: where the weights compute.
    """

    def __init__(self, stepper: HostStepper, buckets: Sequence[Bucket], device: torch.device) -> None:
        self._stepper = stepper
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
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
        if self._stream is not None:
            # What still reads the weights on the device comes first.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        ticket = self._stepper.open(factor, on_done=lambda index: self._bring(stepped[index]))
        with ticket:
            for fragment in fragments:
                found = offload.in_flight(fragment)
                if found is None:
                    continue
                gradient, ready = found
                stepped.append(fragment)
                ticket.submit(fragment.master, gradient, output=self._outputs[fragment], ready=ready)
        ticket.wait()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _bring(self, fragment: Fragment) -> None:
        """Copy new weights to the device; called on the stepper's thread."""
        if self._stream is None:
            fragment.compute.copy_(self._outputs[fragment])
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            fragment.compute.copy_(self._outputs[fragment], non_blocking=True)
