"""Buckets: parameters in one flat buffer, of which each rank owns a part in fp32."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from albireo.distributed import World
from albireo.distributed.collectives import Transfer, all_gather_into
from albireo.sharding.flat import Cut, FlatLayout, plan_buckets

__all__ = ["Bucket", "Fragment", "make_buckets"]


@dataclass(frozen=True, eq=False)
class Fragment:
    """The part of one parameter that this rank owns.

    Attributes:
        parameter: the user's, whole; what computes.
        segment: its number in the bucket.
        cut: which of its elements.
        master: these elements in fp32, 1-D: what an optimizer steps.
        compute: the same elements where the parameter itself has them, 1-D. In fp32 it is the master's own memory.
    """

    parameter: nn.Parameter
    segment: int
    cut: Cut
    master: nn.Parameter
    compute: torch.Tensor

    @property
    def is_first(self) -> bool:
        """True on the rank that has the parameter's first element."""
        return self.cut.start == 0


class Bucket:
    """Some parameters in one flat buffer. Making it moves them there: they become views of the buffer.

    Args:
        parameters: of floating point, not fp64, on one device.
        dtype: what computes.
        world: the ranks that share it.
        on_host: fp32 weights are in host memory.

    Attributes:
        parameters: in the order of the segments.
        layout: where each lies.
        compute: the buffer that computes, 1-D [layout.numel].
        partition: this rank's part of it, 1-D.
        master: this rank's part in fp32, 1-D; in fp32 the same memory as `partition`.
        fragments: this rank's parts of parameters.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], dtype: torch.dtype, world: World, *, on_host: bool = False
    ) -> None:
        self.parameters = tuple(parameters)
        self.layout = FlatLayout.of([parameter.shape for parameter in parameters], world.world_size)
        device = parameters[0].device
        self.compute = torch.zeros(self.layout.numel, dtype=dtype, device=device)
        first = world.rank * self.layout.partition_numel
        self.partition = self.compute[first : first + self.layout.partition_numel]
        if dtype == torch.float32 and not on_host:
            self.master = self.partition
        else:
            place = torch.device("cpu") if on_host else device
            self.master = torch.zeros(self.layout.partition_numel, dtype=torch.float32, device=place)
        cuts = {cut.segment: cut for cut in self.layout.cuts(world.rank)}
        fragments = []
        for number, (parameter, segment) in enumerate(zip(self.parameters, self.layout.segments, strict=True)):
            flat = parameter.detach().reshape(-1)
            self.compute[segment.offset : segment.stop].copy_(flat)
            if number in cuts:
                cut = cuts[number]
                run = slice(cut.offset, cut.offset + cut.numel)
                self.master[run].copy_(flat[cut.start : cut.stop])
                master = nn.Parameter(self.master[run], requires_grad=parameter.requires_grad)
                fragments.append(Fragment(parameter, number, cut, master, self.partition[run]))
            parameter.grad = None
            # The old memory goes with this, one parameter at a time: there are never two copies of a whole model.
            parameter.data = self.compute[segment.offset : segment.stop].view(parameter.shape)
        self.fragments = tuple(fragments)
        self._versions = [_version(parameter) for parameter in self.parameters]

    def publish(self, *, is_cast: bool = False) -> Transfer:
        """Cast this rank's fp32 weights into the buffer that computes, and fetch the other ranks' there.

        Args:
            is_cast: the first has been done.

        Returns:
            What is to be waited for before the buffer is read.
        """
        if not is_cast and self.master is not self.partition:
            self.partition.copy_(self.master)
        # Autograd is to see that the weights are others: a backward through a forward of before would be wrong.
        torch.autograd.graph.increment_version(list(self.parameters))
        self._versions = [_version(parameter) for parameter in self.parameters]
        if self.layout.ranks == 1:
            return Transfer(None)
        return all_gather_into(self.compute, self.partition)

    def check_untouched(self) -> None:
        """Refuse weights that somebody else has changed: the next step would undo it, or not see it.

        Raises:
            RuntimeError: with what to do instead.
        """
        for parameter, segment, version in zip(self.parameters, self.layout.segments, self._versions, strict=True):
            place = self.compute[segment.offset : segment.stop]
            if parameter.data_ptr() != place.data_ptr() or parameter.dtype != place.dtype:
                raise RuntimeError(
                    f"a weight of shape {segment.shape} has left its place: a boosted model must not be cast, moved or "
                    "given other tensors; load weights by booster.load_model"
                )
            if _version(parameter) != version:
                raise RuntimeError(
                    f"a weight of shape {segment.shape} was written to, which the next step would undo: load weights by "
                    "booster.load_model"
                )


def _version(tensor: torch.Tensor) -> int:
    """Return autograd's count of writes to a tensor."""
    version: int = tensor._version  # noqa: SLF001  the one way to it
    return version


def make_buckets(
    parameters: Sequence[nn.Parameter],
    dtypes: Mapping[nn.Parameter, torch.dtype],
    world: World,
    *,
    bucket_elements: int,
    on_host: bool = False,
) -> list[Bucket]:
    """Deal parameters to buckets, the last first: about the order in which their gradients come.

    Args:
        parameters: in the order in which forward uses them.
        dtypes: what each computes in; a bucket has one.
        world: the ranks that share them.
        bucket_elements: about how many elements a bucket has.
        on_host: fp32 weights are in host memory.
    """
    backward_order = list(reversed(parameters))
    buckets = []
    for dtype, run in itertools.groupby(backward_order, key=dtypes.__getitem__):
        members = list(run)
        plan = plan_buckets([parameter.numel() for parameter in members], bucket_elements)
        buckets += [Bucket([members[number] for number in numbers], dtype, world, on_host=on_host) for numbers in plan]
    return buckets
