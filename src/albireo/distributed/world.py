"""The ranks as one of them sees them, and what they say to each other."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from albireo.device import select_device
from albireo.errors import LaunchError

__all__ = ["World", "current_world", "join_world", "leave_world"]

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """All ranks, seen from one of them. With a single rank nothing is ever sent.

    Attributes:
        rank: this rank's number.
        world_size: how many there are.
        local_rank: this rank's number on its machine.
        device: the device it computes on.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world_size > 1:
            # A tensor on the host goes through gloo, which a barrier of NCCL would not: no kernel is launched.
            dist.all_reduce(torch.zeros(1))

    def sum_in_place(self, values: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all ranks, in place.

        Args:
            values: a tensor of one shape and dtype on every rank; the sum is in its dtype.

        Returns:
            The same tensor.
        """
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def share_from_main(self, value: Any) -> Any:
        """Return on every rank what the main rank passed.

        Args:
            value: JSON values on the main rank; anything elsewhere. It travels as JSON bytes, never as a pickle.
        """
        if self.world_size == 1:
            return value
        body = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor([len(body)], dtype=torch.int64)
        dist.broadcast(length, src=0)
        buffer = torch.zeros(int(length[0]), dtype=torch.uint8)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(body), dtype=torch.uint8))
        dist.broadcast(buffer, src=0)
        return json.loads(bytes(buffer.tolist()))

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return every rank's numbers, in rank order, on every rank.

        Args:
            values: as many numbers on each rank; they travel as fp64.
        """
        mine = torch.tensor(list(values), dtype=torch.float64)
        if self.world_size == 1:
            return [mine.tolist()]
        parts = [torch.zeros_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        return [part.tolist() for part in parts]


def join_world(*, store_path: Path | None = None, single: bool = False) -> World:
    """Find the other ranks and return the world.

    The ranks' numbers come from the environment that a launcher sets (RANK, WORLD_SIZE, LOCAL_RANK). Without one, or
    with one rank only, there is no process group at all.

    Args:
        store_path: a file over which the ranks of one machine find each other; without it they meet where
            MASTER_ADDR and MASTER_PORT say.
        single: this process is alone, whatever the environment says.

    Raises:
        LaunchError: the environment's numbers make no sense, or the ranks did not find each other.
    """
    rank, world_size, local_rank = (0, 1, 0) if single else _ranks_from_environment()
    device = select_device(local_rank)
    world = World(rank, world_size, local_rank, device)
    if world_size == 1:
        return world
    # Host tensors go through gloo on every machine: barriers, shared JSON and counts launch nothing on the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"backend": backend, "timeout": _TIMEOUT, "rank": rank, "world_size": world_size}
    if store_path is not None:
        options["store"] = dist.FileStore(str(store_path), world_size)  # type: ignore[attr-defined]
    if device.type == "cuda":
        options["device_id"] = device
    try:
        dist.init_process_group(**options)
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise LaunchError(f"rank {rank} of {world_size} did not find the other ranks: {error}") from error
    return world


def leave_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def current_world() -> World:
    """Return the world of the process group that this process has joined, or a world of one."""
    if not (dist.is_available() and dist.is_initialized()):
        return World(0, 1, 0, select_device(0))
    local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, select_device(local_rank))


def _ranks_from_environment() -> tuple[int, int, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    defaults = ("0", "1", os.environ.get("RANK", "0"))
    texts = [os.environ.get(name, default) for name, default in zip(names, defaults, strict=True)]
    try:
        rank, world_size, local_rank = (int(text) for text in texts)
    except ValueError as error:
        raise LaunchError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, not {', '.join(texts)}") from error
    if not 0 <= rank < world_size:
        raise LaunchError(f"RANK={rank} does not lie below WORLD_SIZE={world_size}")
    return rank, world_size, local_rank
