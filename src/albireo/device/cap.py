"""A bound on the device memory that this process takes."""

from __future__ import annotations

import sys

import torch

from albireo.device.memory import host_room_bytes
from albireo.errors import OutOfMemoryError

__all__ = ["apply_device_cap", "device_room_bytes"]

# What the driver holds for a process beside torch's allocator: the context, loaded kernels and library handles.
# Measured on an H200 with torch 2.11: 0.5 GB for the context, up to 0.8 GB once every kernel of a run is loaded.
_OUTSIDE_ALLOCATOR_BYTES = int(0.9 * 2**30)
_CONTEXT_BYTES = int(0.5 * 2**30)


def apply_device_cap(device: torch.device, cap_bytes: int) -> int:
    """Bound what torch's allocator may take, so that the process as the driver counts it stays under a cap.

    Args:
        device: the GPU.
        cap_bytes: the bound on all that this process takes on it.

    Returns:
        The bytes left to torch's allocator.

    Raises:
        OutOfMemoryError: the cap is below what the driver alone takes, or above what the GPU has.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = _allowed(cap_bytes, total)
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    return allowed


def device_room_bytes(device: torch.device, cap_bytes: int) -> int:
    """Return what torch's allocator may take in all, what it holds already included; for a plan of what goes where.

    Blocks that it cannot use for want of a piece of the right size count as taken: a plan leaves room for them.

    Args:
        device: a GPU, or a CPU that plays one.
        cap_bytes: the bound on all that this process takes on it; 0 for no cap.

    Returns:
        On a GPU, the cap less what the driver takes, or what others leave free if that is less. On a CPU, the cap, or
        what the host has.

    Raises:
        OutOfMemoryError: as by `apply_device_cap`.
    """
    if device.type != "cuda":
        # Where the system does not say how much there is, it bounds nothing.
        return cap_bytes or host_room_bytes(None, 1) or sys.maxsize
    free, total = torch.cuda.mem_get_info(device)
    # The context is there by now; the rest of what the driver takes comes with the first kernels.
    to_come = _OUTSIDE_ALLOCATOR_BYTES - _CONTEXT_BYTES
    left = max(0, free + torch.cuda.memory_reserved(device) - to_come)
    return left if cap_bytes == 0 else min(left, _allowed(cap_bytes, total))


def _allowed(cap_bytes: int, total: int) -> int:
    """Return what a cap leaves to the allocator, or say why it cannot be."""
    if cap_bytes > total:
        raise OutOfMemoryError(
            f"--mem-cap {cap_bytes / 2**30:g} is more than the GPU has: {total / 2**30:.1f} GB; take less, or 0 for no cap"
        )
    allowed = cap_bytes - _OUTSIDE_ALLOCATOR_BYTES
    if allowed <= 0:
        raise OutOfMemoryError(
            f"--mem-cap {cap_bytes / 2**30:g} cannot work: the driver alone takes "
            f"{_OUTSIDE_ALLOCATOR_BYTES / 2**30:.1f} GB for a process; the least that can is "
            f"{_OUTSIDE_ALLOCATOR_BYTES / 2**30 + 0.1:.1f}"
        )
    return allowed
