"""Albireo trains a large model on little hardware, as if device memory and host memory were one.

Importing the package changes nothing and loads nothing heavy; a name that needs torch loads it when it is asked for.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from albireo.booster import Booster
    from albireo.distributed import DistCoordinator, launch_from_torch
    from albireo.distributed.from_torch import launch
    from albireo.models import LazyInitContext
    from albireo.optim import HybridAdam
    from albireo.plugins import GeminiPlugin, LowLevelZeroPlugin, TorchDDPPlugin, TorchFSDPPlugin

__all__ = [
    "Booster",
    "DistCoordinator",
    "GeminiPlugin",
    "HybridAdam",
    "LazyInitContext",
    "LowLevelZeroPlugin",
    "TorchDDPPlugin",
    "TorchFSDPPlugin",
    "__version__",
    "launch",
    "launch_from_torch",
]

__version__ = "0.1.0"


_HOMES = MappingProxyType(
    {
        "Booster": "albireo.booster",
        "DistCoordinator": "albireo.distributed",
        "GeminiPlugin": "albireo.plugins",
        "HybridAdam": "albireo.optim",
        "LazyInitContext": "albireo.models",
        "LowLevelZeroPlugin": "albireo.plugins",
        "TorchDDPPlugin": "albireo.plugins",
        "TorchFSDPPlugin": "albireo.plugins",
        "launch": "albireo.distributed.from_torch",
        "launch_from_torch": "albireo.distributed",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
