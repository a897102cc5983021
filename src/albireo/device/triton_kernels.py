"""Whether kernels in Triton can run. Each has torch's own kernels behind it, which do the same in more passes."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

__all__ = ["triton_runs_on"]


def triton_runs_on(device: torch.device) -> bool:
    """Return True if a kernel in Triton can run on a device.

    It needs an NVIDIA GPU, Triton (which torch brings on Linux), and a C compiler, with which Triton builds its
    launcher at the first use.

    Args:
        device: which.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
