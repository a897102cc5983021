"""Buckets: parameters in one flat buffer, of which each rank owns a part in fp32."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from albireo.distributed import World
from albireo.distributed.collectives import Transfer, all_gather_into
from albireo.optim.split_weights import join, split
from albireo.sharding.flat import Cut, FlatLayout, plan_buckets
from albireo.sharding.untouched import moved_weight, version_of, written_weight

__all__ = ["Bucket", "Fragment", "make_buckets"]


@dataclass(frozen=True, eq=False)
class Fragment:
    """The part of one parameter that this rank owns.

    Attributes:
        parameter: the user's, whole; what computes.
        segment: its number in the bucket.
        cut: which of its elements.
        master: these elements in fp32, 1-D: what an optimizer steps. Where they are kept in halves it is that in name
            alone: each element reads as no number, and takes no memory.
        compute: the same elements where the parameter itself has them, 1-D. In fp32 it is the master's own memory.
        rest: what the compute elements lack, where fp32 weights are kept in two halves; else None.
    """

    parameter: nn.Parameter
    segment: int
    cut: Cut
    master: nn.Parameter
    compute: torch.Tensor
    rest: torch.Tensor | None = None

    @property
    def is_first(self) -> bool:
        """True on the rank that has the parameter's first element."""
        return self.cut.start == 0

    def weights(self) -> torch.Tensor:
        """Return these elements in fp32, 1-D: the master's own memory, or a copy where they are kept in halves."""
        if self.rest is None:
            return self.master.detach()
        wide = torch.empty(self.cut.numel, dtype=torch.float32, device=self.rest.device)
        join(self.compute, self.rest, wide)
        return wide

    def replace_weights(self, wide: torch.Tensor) -> None:
        """Take other values for these elements.

        Args:
            wide: fp32, 1-D; may be what `weights` returned, written to.
        """
        if self.rest is None:
            self.master.detach().copy_(wide)
        else:
            split(wide, self.compute, self.rest)


class Bucket:
    """Some parameters in one flat buffer. Making it moves them there: they become views of the buffer.

    Args:
        parameters: of floating point, not fp64, on one device.
        dtype: what computes.
        world: the ranks that share it.
        on_host: fp32 weights are in host memory.
        in_halves: fp32 weights are kept as what computes, in bf16, and the rest.

    Attributes:
        parameters: in the order of the segments.
        layout: where each lies.
        compute: the buffer that computes, 1-D [layout.numel].
        partition: this rank's part of it, 1-D.
        master: this rank's part in fp32, 1-D; in fp32 the same memory as `partition`; None where it is kept in halves.
        rest: what `partition` lacks where fp32 weights are kept in halves, int16; else None.
        fragments: this rank's parts of parameters.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        dtype: torch.dtype,
        world: World,
        *,
        on_host: bool = False,
        in_halves: bool = False,
    ) -> None:
        self.parameters = tuple(parameters)
        self.layout = FlatLayout.of([parameter.shape for parameter in parameters], world.world_size)
        device = parameters[0].device
        self.compute = torch.zeros(self.layout.numel, dtype=dtype, device=device)
        first = world.rank * self.layout.partition_numel
        self.partition = self.compute[first : first + self.layout.partition_numel]
        place = torch.device("cpu") if on_host else device
        self.master: torch.Tensor | None = None
        self.rest: torch.Tensor | None = None
        if in_halves:
            self.rest = torch.zeros(self.layout.partition_numel, dtype=torch.int16, device=device)
        elif dtype == torch.float32 and not on_host:
            self.master = self.partition
        else:
            self.master = torch.zeros(self.layout.partition_numel, dtype=torch.float32, device=place)
        # What shows at once where somebody reads it.
        self._nothing = torch.full((1,), math.nan, device=place)
        cuts = {cut.segment: cut for cut in self.layout.cuts(world.rank)}
        fragments = []
        for number, (parameter, segment) in enumerate(zip(self.parameters, self.layout.segments, strict=True)):
            flat = parameter.detach().reshape(-1)
            self.compute[segment.offset : segment.stop].copy_(flat)
            if number in cuts:
                cut = cuts[number]
                run = slice(cut.offset, cut.offset + cut.numel)
                memory = self._nothing.expand(cut.numel) if self.master is None else self.master[run]
                master = nn.Parameter(memory, requires_grad=parameter.requires_grad)
                rest = None if self.rest is None else self.rest[run]
                fragment = Fragment(parameter, number, cut, master, self.partition[run], rest)
                fragment.replace_weights(flat[cut.start : cut.stop].float())
                fragments.append(fragment)
            parameter.grad = None
            # The old memory goes with this, one parameter at a time: there are never two copies of a whole model.
            parameter.data = self.compute[segment.offset : segment.stop].view(parameter.shape)
        self.fragments = tuple(fragments)
        self._versions = [version_of(parameter) for parameter in self.parameters]

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Have masters that are kept in halves in memory, for an optimizer to step; the halves are written at the end."""
        if self.rest is None:
            yield
            return
        wide = torch.empty(self.layout.partition_numel, dtype=torch.float32, device=self.rest.device)
        join(self.partition, self.rest, wide)
        for fragment in self.fragments:
            fragment.master.data = wide[fragment.cut.offset : fragment.cut.offset + fragment.cut.numel]
        try:
            yield
            split(wide, self.partition, self.rest)
        finally:
            for fragment in self.fragments:
                fragment.master.data = self._nothing.expand(fragment.cut.numel)

    def publish(self, *, is_cast: bool = False) -> Transfer:
        """Cast this rank's fp32 weights into the buffer that computes, and fetch the other ranks' there.

        Args:
            is_cast: the first has been done; where they are kept in halves it always is.

        Returns:
            What is to be waited for before the buffer is read.
        """
        if not is_cast and self.master is not None and self.master is not self.partition:
            self.partition.copy_(self.master)
        # Autograd is to see that the weights are others: a backward through a forward of before would be wrong.
        torch.autograd.graph.increment_version(list(self.parameters))
        self._versions = [version_of(parameter) for parameter in self.parameters]
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
                raise moved_weight(segment.shape)
            if version_of(parameter) != version:
                raise written_weight(segment.shape)


def make_buckets(
    parameters: Sequence[nn.Parameter],
    dtypes: Mapping[nn.Parameter, torch.dtype],
    world: World,
    *,
    bucket_elements: int,
    on_host: bool = False,
    in_halves: bool = False,
) -> list[Bucket]:
    """Deal parameters to buckets, the last first: about the order in which their gradients come.

    Args:
        parameters: in the order in which forward uses them.
        dtypes: what each computes in; a bucket has one.
        world: the ranks that share them.
        bucket_elements: about how many elements a bucket has.
        on_host: fp32 weights are in host memory.
        in_halves: fp32 weights of what computes in bf16 are kept in two halves.
    """
    backward_order = list(reversed(parameters))
    buckets = []
    for dtype, run in itertools.groupby(backward_order, key=dtypes.__getitem__):
        members = list(run)
        plan = plan_buckets([parameter.numel() for parameter in members], bucket_elements)
        halves = in_halves and dtype == torch.bfloat16
        for numbers in plan:
            chosen = [members[number] for number in numbers]
            buckets.append(Bucket(chosen, dtype, world, on_host=on_host, in_halves=halves))
    return buckets
