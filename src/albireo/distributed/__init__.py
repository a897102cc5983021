"""Ranks: how they start, find each other, and speak. Process groups and collectives live here alone."""

from albireo.distributed.coordinator import DistCoordinator
from albireo.distributed.from_torch import JoinedWorld, launch_from_torch
from albireo.distributed.launch import launch_ranks
from albireo.distributed.local_group import process_group
from albireo.distributed.world import World, current_world, join_world, leave_world

__all__ = [
    "DistCoordinator",
    "JoinedWorld",
    "World",
    "current_world",
    "join_world",
    "launch_from_torch",
    "launch_ranks",
    "leave_world",
    "process_group",
]
