"""Where the launchers of a run meet: on this machine, seen by nobody, or at a place that the user names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from albireo.errors import LaunchError

__all__ = ["LOOPBACK", "MeetingPlace", "MeetingWish", "plan_meeting"]

LOOPBACK = "loopback"
_LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
# torch's own defaults, so that machines that were told only half of it still meet.
_DEFAULT_PORTS = {"static": 29500, "c10d": 29400}


@dataclass(frozen=True)
class MeetingWish:
    """What a user said about where launchers meet; None: nothing.

    Attributes:
        nodes: the smallest and the largest number of machines.
        node_rank: this machine's number, from 0.
        master_addr: the first machine's address.
        master_port: a port there.
        backend: torch's name of a rendezvous: "static", "c10d" and others.
        endpoint: HOST:PORT or HOST, the same on every machine.
    """

    nodes: tuple[int, int] = (1, 1)
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    backend: str | None = None
    endpoint: str | None = None


@dataclass(frozen=True)
class MeetingPlace:
    """Where the launchers meet.

    Attributes:
        backend: "loopback", which is ours, or torch's name of a rendezvous.
        endpoint: HOST:PORT; port 0 of "loopback" is any free one.
        options: what else the backend needs.
        notes: a line about each wish that has no effect.
    """

    backend: str
    endpoint: str
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_meeting(wish: MeetingWish) -> MeetingPlace:
    """Decide where the launchers meet.

    One machine needs no network, and none of its ports is opened to one unless the user names an address that is not
    the machine's own.

    Args:
        wish: what the user said.

    Raises:
        LaunchError: what was said does not suffice, or contradicts itself.
    """
    least, most = wish.nodes
    if wish.node_rank is not None and wish.node_rank >= most:
        raise LaunchError(f"--node-rank {wish.node_rank} must be below --nnodes, which is {most}: it counts from 0")
    host, port, notes = _address(wish)
    # With an endpoint alone no machine has a number; c10d gives them out.
    backend = wish.backend or ("c10d" if wish.endpoint is not None and wish.node_rank is None else "static")
    if most == 1 and backend in _DEFAULT_PORTS and (host is None or host in _LOOPBACK_HOSTS):
        return MeetingPlace(LOOPBACK, f"127.0.0.1:{port or 0}", notes=notes)
    if host is None:
        raise LaunchError(
            f"--nnodes {_range(wish.nodes)} needs a place to meet, the same on every machine: "
            "--rdzv-endpoint HOST:PORT, or --master-addr HOST with --node-rank R"
        )
    endpoint = f"{host}:{_DEFAULT_PORTS.get(backend, 0) if port is None else port}"
    if backend != "static":
        if wish.node_rank is not None:
            notes = (*notes, f"--node-rank has no effect with --rdzv-backend {backend}, which gives numbers out")
        return MeetingPlace(backend, endpoint, notes=notes)
    if least != most:
        raise LaunchError(
            f"--nnodes {least}:{most} is a range: that needs --rdzv-endpoint HOST:PORT and no --node-rank"
        )
    if wish.node_rank is None and most > 1:
        raise LaunchError(
            f"--nnodes {most} with --master-addr {host} needs --node-rank: 0 there, 1 on the next machine"
        )
    return MeetingPlace(backend, endpoint, {"rank": wish.node_rank or 0}, notes)


def _address(wish: MeetingWish) -> tuple[str | None, int | None, tuple[str, ...]]:
    """Return host, port and what has no effect."""
    if wish.endpoint is None:
        return wish.master_addr, wish.master_port, ()
    given = [("--master-addr", wish.master_addr), ("--master-port", wish.master_port)]
    notes = tuple(f"{flag} has no effect beside --rdzv-endpoint" for flag, value in given if value is not None)
    host, colon, text = wish.endpoint.rpartition(":")
    if not colon or text.endswith("]"):  # no port at all, or an IPv6 address without one
        host, text = wish.endpoint, ""
    if not host or not (text == "" or (text.isdecimal() and int(text) < 2**16)):
        raise LaunchError(f"--rdzv-endpoint takes HOST:PORT, not {wish.endpoint!r}")
    return host, int(text) if text else None, notes


def _range(nodes: tuple[int, int]) -> str:
    return str(nodes[0]) if nodes[0] == nodes[1] else f"{nodes[0]}:{nodes[1]}"
