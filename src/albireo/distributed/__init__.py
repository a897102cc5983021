"""Ranks: how they start, find each other, and speak. Process groups and collectives live here alone."""

from albireo.distributed.launch import launch_ranks
from albireo.distributed.world import World, current_world, join_world, leave_world

__all__ = ["World", "current_world", "join_world", "launch_ranks", "leave_world"]
