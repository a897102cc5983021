"""Whether the Hugging Face hub can be reached, found out quickly.

Its own clients try again and again before they give up: 24 seconds for a data set, 46 for a tokenizer.
"""

from __future__ import annotations

import socket
from threading import Thread
from types import MappingProxyType
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

__all__ = ["address_answers", "hub_is_reachable"]

_PORTS = MappingProxyType({"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080})


def hub_is_reachable(timeout_seconds: float = 8.0) -> bool:
    """Whether a connection to the hub, or to the proxy that leads there, can be made now.

    False, at once, where `HF_HUB_OFFLINE` is set. `HF_ENDPOINT` is honoured.

    Args:
        timeout_seconds: the longest that this may take, looking up the name included.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = constants.ENDPOINT
    parts = urlsplit(endpoint)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(parts.hostname or ""):
        endpoint = proxy if "://" in proxy else f"http://{proxy}"
    return address_answers(endpoint, timeout_seconds)


def address_answers(address: str, timeout_seconds: float) -> bool:
    """Whether something takes a TCP connection at an address such as `https://huggingface.co`.

    Args:
        address: scheme and host, and a port where it is not the scheme's own.
        timeout_seconds: the longest that this may take.
    """
    parts = urlsplit(address)
    place = (parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 443))
    answered: list[bool] = []

    def connect() -> None:
        try:
            with socket.create_connection(place, timeout=timeout_seconds):
                answered.append(True)
        except OSError:
            answered.append(False)

    # On a thread, because looking up a name knows no time limit. It ends by itself when the resolver gives up.
    attempt = Thread(target=connect, name="hub-probe", daemon=True)
    attempt.start()
    attempt.join(timeout_seconds)
    return bool(answered) and answered[0]
