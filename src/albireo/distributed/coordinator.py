"""Who this process is among the ranks, for scripts that print, write and wait for each other."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch.distributed as dist

from albireo.distributed.host_collectives import wait_for_all
from albireo.distributed.world import current_world

__all__ = ["DistCoordinator"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class DistCoordinator:
    """A view of the ranks that this process has joined; alone, it is a world of one. Any number may be made.

    Where a method takes a process group of torch, ranks are those within it; without one, all ranks are meant.

    Attributes:
        rank: this rank's number.
        world_size: how many ranks there are.
        local_rank: this rank's number on its machine.
    """

    def __init__(self) -> None:
        world = current_world()
        self.rank = world.rank
        self.world_size = world.world_size
        self.local_rank = world.local_rank

    def is_master(self, process_group: dist.ProcessGroup | None = None) -> bool:
        """Return True on the first rank."""
        return self._rank_in(process_group) == 0

    def is_node_master(self) -> bool:
        """Return True on the first rank of each machine."""
        return self.local_rank == 0

    def is_last_process(self, process_group: dist.ProcessGroup | None = None) -> bool:
        """Return True on the last rank."""
        size = self.world_size if process_group is None else dist.get_world_size(process_group)
        return self._rank_in(process_group) == size - 1

    def print_on_master(self, msg: object, process_group: dist.ProcessGroup | None = None) -> None:
        """Print a line to standard output on the first rank."""
        if self.is_master(process_group):
            _print(msg)

    def print_on_node_master(self, msg: object) -> None:
        """Print a line to standard output on the first rank of each machine."""
        if self.is_node_master():
            _print(msg)

    @contextmanager
    def priority_execution(
        self, executor_rank: int = 0, process_group: dist.ProcessGroup | None = None
    ) -> Iterator[None]:
        """Run a block on one rank first, and on the others when that one is through, even by an exception.

        Args:
            executor_rank: the rank that goes first, such as one that downloads what all read.
            process_group: the ranks that wait.
        """
        goes_first = self._rank_in(process_group) == executor_rank
        if not goes_first:
            self.block_all(process_group)
        try:
            yield
        finally:
            if goes_first:
                self.block_all(process_group)

    def block_all(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Wait until every rank has come here."""
        if self.world_size > 1:
            wait_for_all(process_group)

    def on_master_only(
        self, process_group: dist.ProcessGroup | None = None
    ) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result | None]]:
        """Return a decorator for functions that run on the first rank alone; elsewhere they return None."""
        is_master = self.is_master(process_group)

        def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result | None]:
            @functools.wraps(function)
            def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result | None:
                return function(*args, **kwargs) if is_master else None

            return wrapped

        return decorate

    def _rank_in(self, process_group: dist.ProcessGroup | None) -> int:
        return self.rank if process_group is None else dist.get_rank(process_group)


def _print(message: object) -> None:
    sys.stdout.write(f"{message}\n")
    sys.stdout.flush()
