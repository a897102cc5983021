"""The main rank reads what other ranks hold, as much at a time as it asks for, while it does something with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from albireo.distributed.host_gather import receive_tensor, send_to_main
from albireo.distributed.world import World
from albireo.errors import AlbireoError

__all__ = ["Fetch", "let_main_read"]

Fetch = Callable[[int, int, int, torch.Tensor], None]
"""Called on the main rank with a rank, the number of a tensor there, its first element, and a 1-D host tensor to fill."""


def let_main_read(world: World, tensors: Sequence[torch.Tensor], action: Callable[[Fetch], None]) -> None:
    """Do something on the main rank that reads any rank's tensors; all ranks call this, and all raise if it fails.

    The others send what they are asked for, part by part, and go on when the main rank is through: nowhere is more
    held than the main rank itself holds.

    Args:
        world: the ranks.
        tensors: this rank's, 1-D, on any device.
        action: what the main rank does.

    Raises:
        AlbireoError: on the other ranks, if the action failed, with its message; the main rank raises what it raised.
    """
    if not world.is_main:
        _serve(world, tensors)
        return
    failure: Exception | None = None
    try:
        action(lambda rank, number, start, out: _fetch(world, tensors, (rank, number, start), out))
    except Exception as error:  # noqa: BLE001  raised again below, after the others know
        failure = error
    world.share_from_main({"failure": None if failure is None else str(failure) or type(failure).__name__})
    if failure is not None:
        raise failure


def _fetch(world: World, tensors: Sequence[torch.Tensor], what: tuple[int, int, int], out: torch.Tensor) -> None:
    rank, number, start = what
    if rank == world.rank:
        out.copy_(tensors[number][start : start + out.numel()])
        return
    world.share_from_main({"rank": rank, "number": number, "start": start, "count": out.numel()})
    receive_tensor(out, rank)


def _serve(world: World, tensors: Sequence[torch.Tensor]) -> None:
    while True:
        asked = world.share_from_main(None)
        if "failure" in asked:
            break
        if asked["rank"] == world.rank:
            start, count = asked["start"], asked["count"]
            send_to_main(tensors[asked["number"]][start : start + count].detach().cpu().contiguous())
    if asked["failure"] is not None:
        raise AlbireoError(asked["failure"])
