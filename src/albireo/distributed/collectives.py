"""Collectives on whole buffers, which go on beside the current stream where the device has streams.

A `Transfer` keeps its tensors until it has been waited for: memory that a collective reads or writes must not be given
to somebody else. On a CPU each is done when the call returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from albireo.distributed.host_collectives import run_settled
from albireo.distributed.world import World

__all__ = ["Transfer", "all_gather_into", "all_reduce", "broadcast", "reduce_scatter", "sum_in_rank_order"]


class Transfer:
    """A collective under way.

    Args:
        work: what torch returned; None: it is done.
        tensors: what it reads and writes.
    """

    def __init__(self, work: Any, *tensors: torch.Tensor) -> None:
        self._work = work
        self._tensors = tensors

    def wait(self) -> None:
        """Order the current stream behind it (the host does not wait for a GPU), and let its tensors go."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        self._tensors = ()


def _start(collective: Callable[..., Any], *tensors: torch.Tensor) -> Transfer:
    if tensors[0].device.type == "cpu":
        run_settled(collective, *tensors)
        return Transfer(None)
    return Transfer(collective(*tensors, async_op=True), *tensors)


def _named(new: str, old: str) -> Callable[..., Any]:
    # torch 2.13 warns of the old names, and 2.11 does not know the new ones.
    found: Callable[..., Any] = getattr(dist, new, None) or getattr(dist, old)
    return found


def reduce_scatter(output: torch.Tensor, values: torch.Tensor) -> Transfer:
    """Add a buffer over all ranks; each gets its part of the sum.

    Args:
        output: this rank's part, 1-D: as many elements as `values` has for each rank.
        values: 1-D, of the dtype in which the sum is to be made; its contents are lost.
    """
    return _start(_named("reduce_scatter_single", "reduce_scatter_tensor"), output, values)


def all_gather_into(output: torch.Tensor, values: torch.Tensor) -> Transfer:
    """Put all ranks' parts together, in rank order.

    Args:
        output: 1-D, with the elements of all ranks.
        values: this rank's part, 1-D; it may be its own place in `output`.
    """
    return _start(_named("all_gather_single", "all_gather_into_tensor"), output, values)


def all_reduce(values: torch.Tensor) -> Transfer:
    """Add a tensor over all ranks, in place and in its dtype.

    Args:
        values: of one shape and dtype on every rank.
    """
    return _start(dist.all_reduce, values)


def broadcast(values: torch.Tensor) -> Transfer:
    """Give all ranks what the main rank has, in place.

    Args:
        values: contiguous, of one shape and dtype on every rank.
    """

    def from_main(tensor: torch.Tensor, **how: Any) -> Any:
        return dist.broadcast(tensor, src=0, **how)

    return _start(from_main, values)


def sum_in_rank_order(value: torch.Tensor, world: World) -> torch.Tensor:
    """Return the sum of a number over ranks, added in their order: the same bits on every rank.

    Args:
        value: a scalar on any device.
        world: the ranks.

    Returns:
        A scalar of the same dtype on the world's device.
    """
    value = value.to(world.device)
    if world.world_size == 1:
        return value
    parts = value.new_empty(world.world_size)
    all_gather_into(parts, value.reshape(1)).wait()
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
