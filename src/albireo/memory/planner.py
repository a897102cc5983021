"""The planner: from what is known of a model, its memories and a step to a placement."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from albireo.errors import OutOfMemoryError
from albireo.memory.budget import ChunkBytes, Trace, Use
from albireo.memory.placement import Placement, place_automatically, place_for_warmup, place_statically
from albireo.memory.plan import plan_data
from albireo.memory.rates import HOPPER
from albireo.memory.sizes import ChunkSizes
from albireo.memory.stepping_places import share_of_host, stepping_seconds, streamed_by_time, streamed_bytes
from albireo.memory.stream_pieces import ring_bytes

__all__ = ["MemoryLimits", "PlacementPolicy", "Planner"]


@dataclass(frozen=True)
class PlacementPolicy:
    """What the user says of placement.

    Attributes:
        kind: "auto" decides by what a warm-up step saw; "static" keeps to the shares.
        offload_optim_frac: static: the share of optimizer states that are on the host, by bytes.
        offload_param_frac: static: the share of weights that are at home on the host, by bytes.
        shard_param_frac: static, over several ranks: the share of weights of which each rank has its part alone, by bytes.
        prefetch: how many units ahead fetches begin.
        stream_optim_frac: the share of the states on the host, by bytes, that are streamed through the device and stepped
            there; None: "auto" decides, "static" streams none.
    """

    kind: Literal["auto", "static"] = "auto"
    offload_optim_frac: float = 0.0
    offload_param_frac: float = 0.0
    shard_param_frac: float = 1.0
    prefetch: int = 2
    stream_optim_frac: float | None = 0.0


@dataclass(frozen=True)
class MemoryLimits:
    """What there is for one rank, in bytes.

    Attributes:
        device: for all that torch's allocator gives; None: no bound.
        host: for what is offloaded; None: nobody knows.
    """

    device: int | None
    host: int | None


class Planner:
    """Makes placements. The same inputs give the same on every rank.

    Args:
        sizes: those of all chunks, those that the next forward needs first, first.
        orders: the chunks of each unit, in the order of execution; the last is the root.
        policy: what the user says.
        limits: what there is.
    """

    def __init__(
        self,
        sizes: Sequence[ChunkSizes],
        orders: Sequence[Sequence[int]],
        policy: PlacementPolicy,
        limits: MemoryLimits,
    ) -> None:
        self._sizes = tuple(sizes)
        self._orders = [tuple(order) for order in orders]
        self.policy = policy
        self.limits = limits

    def initial(self) -> Placement:
        """Return where all begins, before anything is known of a step.

        Raises:
            OutOfMemoryError: no placement can work.
        """
        if self.policy.kind == "static":
            return self.place(self._expected(), accumulates=False)
        states, resident = place_for_warmup(
            self._bytes(accumulates=False),
            host_bytes=self.limits.host,
            trace=self._expected(),
            device_bytes=self.limits.device,
        )
        return Placement(
            states_on_device=frozenset(states),
            resident=frozenset(resident),
            keeps=frozenset(),
            fetches=(),
            device_bytes=0,
            host_bytes=0,
            traffic_bytes=0,
        )

    def place(self, trace: Trace, *, accumulates: bool, may_stream: bool = False) -> Placement:
        """Return a placement for a step.

        Args:
            trace: what the step uses.
            accumulates: it has several micro-batches, whose gradients are added up in fp32.
            may_stream: states may be streamed where that is quicker: it can be done, and steps wait for backward.

        Raises:
            OutOfMemoryError: no placement can work.
        """
        share, device = self.policy.stream_optim_frac, self.limits.device
        if not share:
            plain = self._place(trace, device, accumulates=accumulates)
            never = share is not None or self.policy.kind == "static" or not may_stream
            if never or not self._on_host(plain):
                return plain
        ring = ring_bytes(max(sizes.numel // sizes.ranks for sizes in self._sizes))
        try:
            placement = self._place(trace, None if device is None else device - ring, accumulates=accumulates)
        except OutOfMemoryError:
            if share is not None:
                raise
            return plain
        order, parameters = self._on_host(placement), [sizes.numel // sizes.ranks for sizes in self._sizes]
        if share is not None:
            return self._streaming(placement, share_of_host(order, parameters, share), accumulates=accumulates)
        streamed = streamed_by_time(order, parameters, HOPPER)
        # The ring takes room that states would have had.
        alone = stepping_seconds(self._on_host(plain), parameters, frozenset(), HOPPER)
        if not streamed or stepping_seconds(order, parameters, streamed, HOPPER) >= alone:
            return plain
        return self._streaming(placement, streamed, accumulates=accumulates)

    def _on_host(self, placement: Placement) -> list[int]:
        """Return the chunks whose states are on the host, in the order in which they are stepped."""
        return [
            number
            for number, sizes in enumerate(self._sizes)
            if sizes.trained and number not in placement.states_on_device
        ]

    def _streaming(self, placement: Placement, streamed: frozenset[int], *, accumulates: bool) -> Placement:
        """Return a placement with chunks streamed, and with what that moves and takes."""
        if not streamed:
            return placement
        chunks = self._bytes(accumulates=accumulates)
        moved = sum(
            streamed_bytes(
                chunks[number],
                resident=number in placement.resident,
                masters_at_home=self._sizes[number].dtype == torch.float32,
            )
            for number in streamed
        )
        return dataclasses.replace(
            placement,
            streamed=streamed,
            traffic_bytes=placement.traffic_bytes + moved,
            device_bytes=placement.device_bytes + ring_bytes(max(s.numel // s.ranks for s in self._sizes)),
        )

    def _place(self, trace: Trace, device_bytes: int | None, *, accumulates: bool) -> Placement:
        """Return a placement within some room on the device, with nothing streamed."""
        chunks, policy = self._bytes(accumulates=accumulates), self.policy
        if policy.kind == "auto":
            room = 2**62 if device_bytes is None else device_bytes
            return place_automatically(
                trace, chunks, device_bytes=room, host_bytes=self.limits.host, prefetch=policy.prefetch
            )
        return place_statically(
            trace,
            chunks,
            offload_optim_frac=policy.offload_optim_frac,
            offload_param_frac=policy.offload_param_frac,
            shard_param_frac=policy.shard_param_frac if self._sizes[0].ranks > 1 else 0.0,
            prefetch=policy.prefetch,
            device_bytes=device_bytes,
            host_bytes=self.limits.host,
        )

    def describe(self, placement: Placement) -> str:
        """Return a placement in one line.

        Args:
            placement: one of this planner's.
        """
        stepped = [number for number, sizes in enumerate(self._sizes) if sizes.trained]
        on_device = len(placement.states_on_device.intersection(stepped))
        streamed = f", of {len(placement.streamed)} more come to be stepped" if placement.streamed else ""
        gb = 2**30
        return (
            f"placement  {self.policy.kind}: weights of {len(placement.resident)} of {len(self._sizes)} chunks stay on the "
            f"device, states of {on_device} of {len(stepped)}{streamed}; {placement.device_bytes / gb:.2f} GB there, "
            f"{placement.host_bytes / gb:.2f} GB on the host, {placement.traffic_bytes / gb:.2f} GB moved a step"
        )

    def data(self, placement: Placement, units: Sequence[Sequence[str]], *, accumulates: bool) -> dict[str, Any]:
        """Return a placement as JSON values; see `plan_data`.

        Args:
            placement: one of this planner's.
            units: by chunk, the names of its units.
            accumulates: it was made for several micro-batches.
        """
        chunks = self._bytes(accumulates=accumulates)
        return plan_data(placement, self._sizes, chunks, units, kind=self.policy.kind, rates=HOPPER)

    def scaled(self, trace: Trace, factor: float) -> Trace:
        """Return a trace as it would be for a larger batch.

        Args:
            trace: of a batch that was seen.
            factor: how many times as large the next one is. Activations grow no faster.
        """
        return tuple(dataclasses.replace(use, other_bytes=math.ceil(use.other_bytes * factor)) for use in trace)

    def _bytes(self, *, accumulates: bool) -> list[ChunkBytes]:
        return [sizes.bytes(accumulates=accumulates) for sizes in self._sizes]

    def _expected(self) -> Trace:
        """Return the uses of a step that calls each unit once, in order."""
        root, units = frozenset(self._orders[-1]), self._orders[:-1]
        forward: list[Use] = [Use(root, 0, "forward"), *(Use(root | set(unit), 0, "forward") for unit in units)]
        backward: list[Use] = [
            Use(root, 0, "backward"),
            *(Use(root | set(unit), 0, "backward") for unit in reversed(units)),
        ]
        return (*forward, *backward, Use(frozenset(), 0, "step"))
