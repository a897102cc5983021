"""A process group for one rank, for what cannot do without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from albireo.distributed.world import World, join_world, leave_world
from albireo.errors import ConfigError

__all__ = ["process_group", "rank_mesh"]


@contextmanager
def process_group(world: World) -> Iterator[None]:
    """Give this process a process group while a block runs, if it is alone and has none.

    Args:
        world: the ranks; several have a group already.
    """
    if world.world_size > 1 or dist.is_initialized():
        yield
        return
    join_world(ranks=(0, 1, world.local_rank), always_group=True)
    try:
        yield
    finally:
        leave_world()


def rank_mesh(world: World) -> DeviceMesh:
    """Return all ranks as a mesh with one axis.

    Args:
        world: the ranks.

    Raises:
        ConfigError: there is no process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "sharding by torch needs a process group, on one rank too: call albireo.launch_from_torch() first"
        )
    return init_device_mesh(world.device.type, (world.world_size,))
