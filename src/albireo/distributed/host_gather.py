"""What all ranks have, brought to the main rank: JSON and tensors in host memory, never a pickle."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from albireo.distributed.host_collectives import run_settled
from albireo.distributed.world import World

__all__ = ["gather_json", "receive_tensor", "send_to_main"]


def gather_json(value: Any, world: World) -> list[Any] | None:
    """Return every rank's value, in rank order, on the main rank; None on the others. All ranks call this.

    Args:
        value: JSON values.
        world: the ranks.
    """
    if world.world_size == 1:
        return [value]
    body = json.dumps(value).encode()
    lengths = [int(length) for (length,) in world.gather_numbers([len(body)])]
    if not world.is_main:
        send_to_main(torch.frombuffer(bytearray(body), dtype=torch.uint8))
        return None
    values = [value]
    for rank in range(1, world.world_size):
        received = torch.empty(lengths[rank], dtype=torch.uint8)
        receive_tensor(received, rank)
        values.append(json.loads(bytes(received.numpy())))
    return values


def send_to_main(tensor: torch.Tensor) -> None:
    """Send a tensor to the main rank, which has to call `receive_tensor` for it; returns when it is there.

    Args:
        tensor: 1-D, contiguous, in host memory. One without elements is not sent.
    """
    if tensor.numel() > 0:
        run_settled(partial(dist.send, dst=0), tensor.view(torch.uint8))


def receive_tensor(tensor: torch.Tensor, rank: int) -> None:
    """Fill a tensor with the next one that a rank sends to this one.

    Args:
        tensor: 1-D, contiguous, in host memory, of the size and dtype that is sent.
        rank: who sends it.
    """
    if tensor.numel() > 0:
        run_settled(partial(dist.recv, src=rank), tensor.view(torch.uint8))
