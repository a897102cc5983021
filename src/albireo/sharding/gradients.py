"""Gradients on their way from autograd to the fragments that are stepped: taken, added up, and kept."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from albireo.errors import ConfigError
from albireo.optim import norms_of, sum_of_squared_norms
from albireo.sharding.bucket import Fragment
from albireo.sharding.flat_parameters import FlatParameters
from albireo.sharding.offload import GradientOffload

__all__ = ["Gradients", "LocalGradients"]


class Gradients(ABC):
    """Takes each parameter's gradient when it is complete, and keeps what this rank steps.

    Args:
        buckets: whose parameters, in the order in which they are to be reduced.
        offload: takes gradients of its buckets to the host as soon as they are complete; None keeps all on the device.

    Attributes:
        buckets: the same.
        offload: the same.
        on_gradient: called with a bucket and a segment's number when that parameter's gradient has come, before it is
            taken.
    """

    def __init__(self, buckets: Sequence[FlatParameters], offload: GradientOffload | None = None) -> None:
        self.buckets = tuple(buckets)
        self.offload = offload
        self._taking = False
        self._more_to_come = False
        self._reducing = True
        self._factor: torch.Tensor | None = None
        self.on_gradient: Callable[[FlatParameters, int], None] | None = None
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
    def take(self, bucket: FlatParameters, number: int, gradient: torch.Tensor) -> None:
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
        return self._is_offloaded(fragment) or self.of(fragment) is not None

    def recall(self, bucket: FlatParameters) -> None:
        """Bring a bucket's gradients back from the host, as they are there: its states have come to the device.

        Args:
            bucket: from now on `offload` is not to take its gradients.
        """
        if self.offload is None:
            return
        for fragment in bucket.fragments:
            gradient = self.offload.recall(fragment)
            if gradient is not None:
                self._keep(fragment, gradient)

    @abstractmethod
    def send_kept(self) -> None:
        """Send what is kept of buckets whose gradients leave since their states went to the host; no rank waits."""

    @abstractmethod
    def _keep(self, fragment: Fragment, gradient: torch.Tensor) -> None:
        """Keep a gradient on the device."""

    @abstractmethod
    def kept_bytes(self, bucket: FlatParameters) -> int:
        """Return what a bucket's gradients take on the device where they wait for the step."""

    def _is_offloaded(self, fragment: Fragment) -> bool:
        """True if a gradient is on the host, or on its way there."""
        return self.offload is not None and self.offload.in_flight(fragment) is not None

    def _offload_of(self, bucket: FlatParameters) -> GradientOffload | None:
        """Return what takes a bucket's gradients to the host in this backward; None if they stay."""
        offload = self.offload
        if offload is None or not offload.takes(bucket) or not self._reducing:
            return None
        return offload if offload.takes_each or not self._more_to_come else None

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
        ready = [gradient for fragment, gradient in self.kept() if not self.is_to_be_cast(fragment, gradient)]
        if ready:
            torch._foreach_mul_(ready, factor)

    def is_to_be_cast(self, fragment: Fragment, gradient: torch.Tensor) -> bool:
        """Return True if a gradient, as it is kept, is not what is to be stepped: it is narrow, or it was offloaded."""
        return gradient.dtype != torch.float32 or self._is_offloaded(fragment)

    def sum_of_squares(self) -> torch.Tensor:
        """Return the sum of squares of this rank's gradients as they are kept, an fp64 scalar."""
        fragments = [f for bucket in self.buckets for f in bucket.fragments if self.has(f)]
        gradients = [(f, self.of(f)) for f in fragments if not self._is_offloaded(f)]
        here = [(f, gradient) for f, gradient in gradients if gradient is not None]
        norms = dict(zip((f for f, _ in here), norms_of([gradient for _, gradient in here]), strict=True))
        # Those that left had their norm taken on the device; wherever they are, they are added up in one order.
        if self.offload is not None:
            norms |= {f: self.offload.norm_of(f) for f in fragments if f not in norms}
        return sum_of_squared_norms(norms[f] for f in fragments)

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

    def _hook(self, bucket: FlatParameters, number: int) -> Callable[[torch.Tensor], None]:
        # Python's collector does not see through torch's hooks: one that holds its own parameter would never be freed.
        owner, place = weakref.ref(self), self.buckets.index(bucket)

        def take(parameter: torch.Tensor) -> None:
            gradients = owner()
            if gradients is not None:
                gradients._take_from(parameter, gradients.buckets[place], number)  # noqa: SLF001  of this class

        return take

    def _take_from(self, parameter: torch.Tensor, bucket: FlatParameters, number: int) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if not self._taking:
            raise RuntimeError("sharded gradients are taken by booster.backward(loss, optimizer), not loss.backward()")
        if gradient.layout != torch.strided:
            raise ConfigError("sharding needs dense gradients: make the embedding with sparse=False")
        with torch.no_grad():
            if self.on_gradient is not None:
                self.on_gradient(bucket, number)
            self.take(bucket, number, gradient.detach())


class LocalGradients(Gradients):
    """Gradients of a rank that is alone: each stays in the memory that autograd put it in.

    A single micro-batch's 16-bit gradients stay 16-bit, for their fp32 values are the same; a second one's are added up
    in fp32. Those that leave for the host leave a bucket at a time.
    """

    def __init__(self, buckets: Sequence[FlatParameters], offload: GradientOffload | None = None) -> None:
        super().__init__(buckets, offload)
        self._kept: dict[nn.Parameter, torch.Tensor] = {}
        # Alone, each parameter is one fragment.
        self._fragments = {fragment.parameter: fragment for bucket in buckets for fragment in bucket.fragments}
        self._arrived: dict[FlatParameters, set[int]] = {bucket: set() for bucket in self.buckets}

    def take(self, bucket: FlatParameters, number: int, gradient: torch.Tensor) -> None:
        """See the base class."""
        parameter = bucket.parameters[number]
        kept = self._kept.pop(parameter, None)
        if kept is None and self.offload is not None:
            kept = self.offload.recall(self._fragments[parameter])
        total = gradient.reshape(-1)
        if kept is not None:
            total = (kept if kept.dtype == torch.float32 else kept.float()).add_(total)
        self._kept[parameter] = total
        arrived = self._arrived[bucket]
        arrived.add(number)
        if len(arrived) == len(bucket.parameters):
            self._send(bucket)

    @property
    def has_unsent(self) -> bool:
        """See the base class."""
        offload = self.offload
        return offload is not None and any(offload.takes(bucket) and self._kept_of(bucket) for bucket in self.buckets)

    def finish(self) -> None:
        """See the base class: there are no ranks, but what came earlier in the step and not again goes to the host."""
        for bucket in self.buckets:
            self._send(bucket)
        if self.offload is not None:
            self.offload.settle()

    def abandon(self) -> None:
        """See the base class."""
        self.clear()

    def of(self, fragment: Fragment) -> torch.Tensor | None:
        """See the base class."""
        kept = self._kept.get(fragment.parameter)
        return self.offload.of(fragment) if kept is None and self.offload is not None else kept

    def clear(self) -> None:
        """See the base class."""
        self._kept.clear()
        for arrived in self._arrived.values():
            arrived.clear()
        if self.offload is not None:
            self.offload.clear()
        self._factor = None

    def _keep(self, fragment: Fragment, gradient: torch.Tensor) -> None:
        self._kept[fragment.parameter] = gradient

    def kept_bytes(self, bucket: FlatParameters) -> int:
        """See the base class."""
        gradients = [self._kept[p] for p in bucket.parameters if p in self._kept]
        return sum(gradient.numel() * gradient.element_size() for gradient in gradients)

    def send_kept(self) -> None:
        """See the base class."""
        for bucket in self.buckets:
            self._send(bucket)
        if self.offload is not None:
            self.offload.settle()

    def _kept_of(self, bucket: FlatParameters) -> list[Fragment]:
        return [self._fragments[p] for p in bucket.parameters if p in self._kept]

    def _send(self, bucket: FlatParameters) -> None:
        """Send what is kept of a bucket on its way to the host, if it is to go there now."""
        self._arrived[bucket].clear()
        offload = self._offload_of(bucket)
        if offload is not None:
            offload.send(bucket, [(f, self._kept.pop(f.parameter)) for f in self._kept_of(bucket)])
