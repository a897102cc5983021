"""A bound on the device memory that this process takes."""

from __future__ import annotations

import torch

from albireo.errors import OutOfMemoryError

__all__ = ["apply_device_cap"]

# What the driver holds for a process beside torch's allocator: the context, loaded kernels and library handles.
# Measured on an H200 with torch 2.11: 0.5 GB for the context, up to 0.8 GB once every kernel of a run is loaded.
_OUTSIDE_ALLOCATOR_BYTES = int(0.9 * 2**30)


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
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    return allowed
