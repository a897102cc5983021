"""Start a script on several ranks through torch's elastic launcher, and see it through.

torch's agent starts the ranks, watches them, starts them anew if asked to, and meets the agents of other machines. What
is added here: each rank dies with the launcher, has its share of the cores, and ranks of one machine are not to be seen
on any network; arguments and exit codes arrive as they are.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from albireo.distributed import lifeline
from albireo.distributed.launch import describe_end, loopback_environment, threads_environment
from albireo.errors import Interrupted, LaunchError
from albireo.log import Log

__all__ = ["ElasticPlan", "launch_elastic", "plan_rendezvous"]

_STATIC_PORT = 29500
# A save of a large model takes minutes; torch's own 30 seconds would cut it off.
_SHUTDOWN_SECONDS = 300


@dataclass(frozen=True)
class ElasticPlan:
    """What torch's agent on this machine is to do.

    Attributes:
        ranks_per_node: ranks on this machine.
        min_nodes: machines to begin with at least.
        max_nodes: machines that may join.
        backend: "loopback" (this machine alone, seen by nobody), or the name of one of torch's: "static", "c10d".
        endpoint: HOST:PORT where the agents meet. Port 0 of "loopback" is any free one.
        run_id: the same for all agents of a run.
        rendezvous_options: more options of the backend.
        local_addr: this machine's address as others see it; looked up if None.
        max_restarts: how often all ranks are started anew after one failed.
        shutdown_seconds: how long ranks may take to end after a signal; None: as long as torch lets them, at most 300.
    """

    ranks_per_node: int
    min_nodes: int = 1
    max_nodes: int = 1
    backend: str = "loopback"
    endpoint: str = "127.0.0.1:0"
    run_id: str = "none"
    rendezvous_options: Mapping[str, Any] = field(default_factory=dict)
    local_addr: str | None = None
    max_restarts: int = 0
    shutdown_seconds: int | None = None


@dataclass(frozen=True)
class RendezvousWish:
    """What a user said about where ranks meet; None: nothing.

    Attributes:
        nodes: the smallest and the largest number of machines.
        node_rank: this machine's number.
        master_addr: the first machine's address.
        master_port: a port there.
        backend: torch's name of the rendezvous.
        endpoint: HOST:PORT.
    """

    nodes: tuple[int, int] = (1, 1)
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    backend: str | None = None
    endpoint: str | None = None


def plan_rendezvous(wish: RendezvousWish) -> tuple[str, str, dict[str, Any], list[str]]:
    """Decide where the agents meet.

    Args:
        wish: what the user said.

    Returns:
        The backend, the endpoint, more options of the backend, and lines about what has no effect.

    Raises:
        LaunchError: what was said does not suffice, or contradicts itself.
    """
    least, most = wish.nodes
    if wish.node_rank is not None and wish.node_rank >= most:
        raise LaunchError(f"--node-rank {wish.node_rank} must be below --nnodes, which is {most}; it counts from 0")
    if most == 1 and wish.backend is None and wish.endpoint is None and wish.master_addr in _LOOPBACK_NAMES:
        return "loopback", f"127.0.0.1:{wish.master_port or 0}", {}, []
    # With an endpoint alone nobody has a number yet; torch's c10d rendezvous gives them out.
    backend = wish.backend or ("c10d" if wish.endpoint is not None and wish.node_rank is None else "static")
    without_effect = {
        "--master-addr": wish.master_addr is not None and wish.endpoint is not None,
        "--master-port": wish.master_port is not None and wish.endpoint is not None,
        "--node-rank": wish.node_rank is not None and backend != "static",
    }
    notes = [f"{flag} has no effect beside --rdzv-backend {backend}" if flag == "--node-rank" else
             f"{flag} has no effect beside --rdzv-endpoint" for flag, so in without_effect.items() if so]
    if backend != "static":
        endpoint = wish.endpoint or _join(wish.master_addr, wish.master_port)
        if endpoint is None:
            raise LaunchError(f"--rdzv-backend {backend} needs --rdzv-endpoint HOST:PORT, the same on every machine")
        return backend, endpoint, {}, notes
    if least != most:
        raise LaunchError(f"--nnodes {least}:{most}, a range, needs --rdzv-backend c10d and --rdzv-endpoint HOST:PORT")
    endpoint = wish.endpoint or _join(wish.master_addr, wish.master_port)
    if endpoint is None:
        raise LaunchError(
            f"--nnodes {most} needs a place to meet, the same on every machine: --rdzv-endpoint HOST:PORT, "
            "or --master-addr HOST with --node-rank R"
        )
    if wish.node_rank is None and most > 1:
        raise LaunchError(f"--nnodes {most} with --master-addr needs --node-rank: 0 on {wish.master_addr}, 1 on the next")
    return backend, endpoint, {"rank": wish.node_rank or 0}, notes


_LOOPBACK_NAMES = (None, "127.0.0.1", "localhost")


def _join(host: str | None, port: int | None) -> str | None:
    return None if host is None else f"{host}:{_STATIC_PORT if port is None else port}"
