"""Joining the other ranks from a script of the user's own, and leaving them when it ends."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch.distributed.distributed_c10d import _get_default_store

from albireo.device import device_count, seed_everything
from albireo.distributed.notice_board import StoreBoard
from albireo.distributed.watchdog import PATIENCE_SECONDS, SCRIPT_STUCK_SECONDS, Watchdog
from albireo.distributed.world import World, join_world, leave_world
from albireo.errors import ConfigError, LaunchError
from albireo.log import Log

__all__ = ["JoinedWorld", "launch", "launch_from_torch"]

_BACKENDS = ("nccl", "gloo")
_LAST_MOMENT_SECONDS = 0.01


class JoinedWorld(World):
    """The ranks that a script has joined. It leaves them when it ends, or where a `with` block of this ends."""

    _watchdog: Watchdog | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        atexit.unregister(self._leave_at_exit)
        self._leave(failed=error is not None)

    def watch(self, patience_seconds: float) -> None:
        """Have the ranks watch each other until they are left.

        Args:
            patience_seconds: how long to be sure that one will not come; 0: they do not watch.
        """
        if self.world_size == 1 or patience_seconds == 0:
            return
        watchdog = Watchdog(
            StoreBoard(_get_default_store(), self.rank, self.world_size),
            self.rank,
            patience_seconds=patience_seconds,
            stuck_seconds=max(SCRIPT_STUCK_SECONDS, patience_seconds),
        )
        object.__setattr__(self, "_watchdog", watchdog.__enter__())

    def _leave_at_exit(self) -> None:
        # Python keeps the exception that ended the program here. Its peers may never come to leave.
        self._leave(failed=getattr(sys, "last_value", None) is not None)

    def _leave(self, *, failed: bool) -> None:
        if self._watchdog is not None:
            self._watchdog.close(failed=failed)
        leave_world(failed=failed)
        # gloo's threads may still hold tensors of the script's own collectives; see `host_collectives`. The
        # interpreter's lock is theirs for a moment before the interpreter ends.
        time.sleep(_LAST_MOMENT_SECONDS)


def launch_from_torch(
    backend: str | Mapping[str, Any] = "nccl",
    seed: int = 1024,
    verbose: bool = True,
    *,
    watchdog_seconds: float = PATIENCE_SECONDS,
    config: object = None,  # noqa: ARG001  see below
) -> JoinedWorld:
    """Join the ranks that `albireo run` or `torchrun` started; a process that nobody started so is a world of one.

    A process group is joined in any case, so that calls of `torch.distributed` work on one rank too.

    Args:
        backend: "nccl" (gloo for tensors on the host) or "gloo". Without a GPU "nccl" becomes "gloo", which is said.
            A mapping in its place is the `config` of older scripts, and is not used.
        seed: for Python's, NumPy's and torch's generators, the same on all ranks, so that all build the same model.
        verbose: say on the main rank what was joined.
        watchdog_seconds: how long to be sure before all ranks are ended because one will never come to the collective
            that others wait in; 0: never. See docs/watchdog.md.
        config: what older scripts pass; not used.

    Returns:
        The ranks. They are left at the interpreter's exit, or at the end of a `with` block.

    Raises:
        ConfigError: there is no such backend.
        LaunchError: the environment makes no sense, the ranks do not find each other, or this process has joined
            before.
    """
    if not isinstance(backend, str):
        if not isinstance(seed, int):  # launch_from_torch(config, "gloo")
            raise ConfigError(f"after a config, give the backend by its name: backend={seed!r}")
        backend = "nccl"
    return _join(backend, seed, verbose=verbose, watchdog_seconds=watchdog_seconds)


def launch(  # noqa: PLR0913  the arguments are those that scripts pass
    rank: int,
    world_size: int,
    host: str,
    port: int,
    backend: str = "nccl",
    local_rank: int | None = None,
    seed: int = 1024,
    verbose: bool = True,
    *,
    watchdog_seconds: float = PATIENCE_SECONDS,
    config: object = None,  # noqa: ARG001  what older scripts pass; not used
) -> JoinedWorld:
    """Join ranks that were started by other means, such as a scheduler's.

    Args:
        rank: this rank's number.
        world_size: how many there are.
        host: the first rank's address.
        port: a free port there, on which it listens.
        backend: see `launch_from_torch`.
        local_rank: this rank's number on its machine; with as many GPUs on each, `rank` modulo their number.
        seed: see `launch_from_torch`.
        verbose: see `launch_from_torch`.
        watchdog_seconds: see `launch_from_torch`.
        config: what older scripts pass; not used.

    Returns:
        See `launch_from_torch`.

    Raises:
        LaunchError: see `launch_from_torch`.
    """
    if local_rank is None:
        local_rank = rank % device_count() if torch.cuda.is_available() else rank
    return _join(
        backend,
        seed,
        verbose=verbose,
        watchdog_seconds=watchdog_seconds,
        ranks=(rank, world_size, local_rank),
        address=f"tcp://{host}:{port}",
    )


def _join(
    backend: str,
    seed: int,
    *,
    verbose: bool,
    watchdog_seconds: float,
    ranks: tuple[int, int, int] | None = None,
    address: str | None = None,
) -> JoinedWorld:
    if backend not in _BACKENDS:
        raise ConfigError(f"backend is one of {', '.join(_BACKENDS)}, not {backend!r}")
    if watchdog_seconds < 0:
        raise ConfigError(f"watchdog_seconds is a time, or 0 for no watchdog, not {watchdog_seconds:g}")
    if torch.distributed.is_initialized():
        raise LaunchError("this process has joined its ranks already: launch once, or leave by a `with` block first")
    chosen = backend if torch.cuda.is_available() else "gloo"
    joined = join_world(ranks=ranks, address=address, backend=chosen, always_group=True)
    world = JoinedWorld(joined.rank, joined.world_size, joined.local_rank, joined.device)
    atexit.register(world._leave_at_exit)  # noqa: SLF001  the class is this file's
    world.watch(watchdog_seconds)
    seed_everything(seed)
    note = "" if chosen == backend else f"; {backend} needs a GPU, and there is none here"
    count = f"{world.world_size} rank{'s' if world.world_size > 1 else ''}"
    Log(enabled=verbose and world.is_main).line(f"joined {count} over {chosen}, seed {seed}{note}")
    return world
