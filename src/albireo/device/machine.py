"""Which device a rank computes on."""

from __future__ import annotations

import platform

import torch

__all__ = ["describe_device", "detect_device_type", "device_count", "has_native_bf16", "select_device"]


def detect_device_type() -> str:
    """Return "cuda" where there is a GPU that torch can use, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_count() -> int:
    """Return how many GPUs there are, or 1 for a CPU."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 1


def has_native_bf16() -> bool:
    """Return True if the GPU multiplies bf16 matrices in hardware (compute capability 8.0 and later)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def select_device(local_rank: int) -> torch.device:
    """Return the device of a rank of this machine, and make it the process's current one.

    Args:
        local_rank: the rank's number on its machine.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def describe_device(device: torch.device) -> str:
    """Return the device's name for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
