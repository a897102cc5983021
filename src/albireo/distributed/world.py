"""The ranks as one of them sees them, and what they say to each other."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group

from albireo.device import select_device
from albireo.distributed.host_collectives import run_settled, wait_for_all
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

    @property
    def local_world_size(self) -> int:
        """How many ranks share this machine, as the launcher says; all of them where it does not."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world_size > 1:
            wait_for_all()

    def sum_in_place(self, values: torch.Tensor) -> torch.Tensor:
        """Add a tensor over all ranks, in place.

        Args:
            values: a tensor of one shape and dtype on every rank; the sum is in its dtype.

        Returns:
            The same tensor.
        """
        if self.world_size > 1:
            run_settled(dist.all_reduce, values)
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
        run_settled(partial(dist.broadcast, src=0), length)
        buffer = torch.zeros(int(length[0]), dtype=torch.uint8)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(body), dtype=torch.uint8))
        run_settled(partial(dist.broadcast, src=0), buffer)
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
        run_settled(lambda own, *others: dist.all_gather(list(others), own), mine, *parts)
        return [part.tolist() for part in parts]


def join_world(
    *,
    store_path: Path | None = None,
    single: bool = False,
    ranks: tuple[int, int, int] | None = None,
    address: str | None = None,
    backend: str | None = None,
    always_group: bool = False,
) -> World:
    """Find the other ranks and return the world.

    The ranks' numbers come from the environment that a launcher sets (RANK, WORLD_SIZE, LOCAL_RANK). Without one, or
    with one rank only, there is no process group at all unless one is asked for.

    Args:
        store_path: a file over which the ranks of one machine find each other.
        single: this process is alone, whatever the environment says.
        ranks: rank, world size and local rank, instead of those of the environment.
        address: where the ranks meet, as `tcp://HOST:PORT`; without it and `store_path` they meet where MASTER_ADDR and
            MASTER_PORT say.
        backend: "nccl" or "gloo" for tensors on a GPU; nccl if None.
        always_group: a single rank has a process group too.

    Raises:
        LaunchError: the environment's numbers make no sense, there is no GPU for this rank, or the ranks did not find
            each other.
    """
    if ranks is None:
        ranks = (0, 1, 0) if single else _ranks_from_environment()
    rank, world_size, local_rank = ranks
    if not 0 <= rank < world_size:
        raise LaunchError(f"rank {rank} does not lie below the world size {world_size}")
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {local_rank} has no GPU of its own, since this machine has {torch.cuda.device_count()}: start "
            "no more ranks on a machine than it has GPUs"
        )
    device = select_device(local_rank)
    world = World(rank, world_size, local_rank, device)
    if world_size == 1 and not always_group:
        return world
    # Host tensors go through gloo on every machine: barriers, shared JSON and counts launch nothing on the device.
    over = f"cpu:gloo,cuda:{backend or 'nccl'}" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"backend": over, "timeout": _TIMEOUT, "rank": rank, "world_size": world_size}
    if world_size == 1:
        options["store"] = dist.HashStore()  # type: ignore[attr-defined]
    elif store_path is not None:
        options["store"] = dist.FileStore(str(store_path), world_size)  # type: ignore[attr-defined]
    elif address is not None:
        options["init_method"] = address
    if device.type == "cuda" and world_size > 1 and backend != "gloo":
        options["device_id"] = device
    try:
        dist.init_process_group(**options)
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise LaunchError(f"rank {rank} of {world_size} did not find the other ranks: {error}") from error
    return world


def leave_world(*, failed: bool = False) -> None:
    """Leave the process group, if there is one.

    Args:
        failed: the other ranks may never come to leave too, so they are not waited for.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    if failed:
        # Taking NCCL down in good order is a collective, for which nobody may come.
        _abort_process_group()
    else:
        dist.destroy_process_group()


def current_world() -> World:
    """Return the world of the process group that this process has joined, or a world of one.

    Raises:
        LaunchError: a launcher has started several ranks and this one has not joined them, or the group that was joined
            cannot send tensors of the host.
    """
    if not (dist.is_available() and dist.is_initialized()):
        started = os.environ.get("WORLD_SIZE", "1")
        if started != "1":
            # Alone, each rank would train a model of its own, and nobody would notice.
            raise LaunchError(
                f"{started} ranks were started, and this one has not joined: call launch_from_torch() first"
            )
        return World(0, 1, 0, select_device(0))
    if "gloo" not in dist.get_backend_config() and dist.get_world_size() > 1:
        raise LaunchError(
            f"the process group speaks over {dist.get_backend_config()} alone, and counts and barriers are tensors on "
            "the host: join by albireo.launch_from_torch(), or by init_process_group without a backend"
        )
    rank = dist.get_rank()
    # Whoever joined has made a GPU the current one; on a CPU without a launcher, nothing tells of other machines.
    default = torch.cuda.current_device() if torch.cuda.is_available() else rank
    local_rank = int(os.environ.get("LOCAL_RANK", default))
    return World(rank, dist.get_world_size(), local_rank, select_device(local_rank))


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
