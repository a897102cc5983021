"""A meeting place that only this machine can see: torch's own stores listen on every network of the machine."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

from albireo.distributed.rendezvous import LOOPBACK
from albireo.errors import LaunchError

__all__ = ["LoopbackRendezvous"]

_STORE_TIMEOUT = timedelta(minutes=10)


class LoopbackRendezvous(RendezvousHandler):
    """A meeting of one launcher, with a store for its ranks.

    Args:
        parameters: as torch's launcher makes them; of the endpoint only the port counts, 0 being any free one.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._port = int(parameters.endpoint.rpartition(":")[2])
        self._store: Any = None

    def get_backend(self) -> str:
        """Return the name it is registered by."""
        return LOOPBACK

    @property
    def use_agent_store(self) -> bool:
        """True: ranks use this store instead of opening one, which would listen everywhere."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Open a store that is empty: ranks that start anew must not read what earlier ones left.

        Raises:
            LaunchError: the port is in use.
        """
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", self._port))
            listener.listen(512)
        except OSError as error:
            listener.close()
            raise LaunchError(
                f"--master-port {self._port} cannot be had: {error.strerror}; leave it out for any"
            ) from error
        # The first store still holds the port that was asked for when ranks start anew.
        self._port = 0
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1",
            port,
            is_master=True,
            timeout=_STORE_TIMEOUT,
            wait_for_workers=False,
            # From here on the socket belongs to the store.
            master_listen_fd=listener.detach(),
        )
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", port))

    def is_closed(self) -> bool:
        """Return False: nobody else could close it."""
        return False

    def set_closed(self) -> None:
        """Do nothing: nobody else is told."""

    def num_nodes_waiting(self) -> int:
        """Return 0: there is one machine."""
        return 0

    def get_run_id(self) -> str:
        """Return the run's name."""
        return self._run_id

    def shutdown(self) -> bool:
        """Close the store."""
        self._store = None
        return True
