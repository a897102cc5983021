"""Whether the hub of models and data sets answers."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

__all__ = ["hub_problem"]

_TIMEOUT_SECONDS = 5.0


def hub_problem() -> str:
    """Ask the hub for an answer; returns why there is none, or nothing."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not address.startswith(("https://", "http://")):
        return f"HF_ENDPOINT={address} is no address of the web"
    try:
        request = urllib.request.Request(address, method="HEAD")  # noqa: S310  the scheme was looked at
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):  # noqa: S310
            return ""
    except urllib.error.HTTPError:
        return ""  # an answer, if not a friendly one
    except (OSError, ValueError) as error:
        return f"{address}: {getattr(error, 'reason', error)}"
