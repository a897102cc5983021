"""Gradients on their way from autograd to the fragments that are stepped: taken, added up, and kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from albireo.errors import ConfigError
from albireo.optim import sum_of_squares
from albireo.sharding.bucket import Bucket, Fragment
from albireo.sharding.offload import GradientOffload

__all__ = ["Gradients", "LocalGradients"]


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
