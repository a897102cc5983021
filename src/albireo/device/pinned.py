"""Host memory that a GPU copies to and from at full speed, in exactly the size that is asked for."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from albireo.errors import OutOfMemoryError

__all__ = ["host_buffer"]


def host_buffer(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return uninitialised host memory, page-locked where the device is a GPU.

    torch rounds each block that it pins up to a power of two; this is registered as it is, and released with the
    tensor's memory.

    Args:
        numel: elements; the buffer is 1-D.
        dtype: theirs.
        device: what is to copy to and from it.

    Raises:
        OutOfMemoryError: so much cannot be page-locked.
    """
    buffer = torch.empty(numel, dtype=dtype)
    if device.type != "cuda" or numel == 0:
        return buffer
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address, size = buffer.data_ptr(), buffer.numel() * buffer.element_size()
    error = runtime.cudaHostRegister(address, size, 0)
    if int(error) != 0:
        raise OutOfMemoryError(
            f"{size / 2**30:.2f} GB of host memory could not be page-locked (CUDA error {int(error)}): leave more host "
            "memory free, or raise the limit of locked memory (ulimit -l)"
        )
    # The storage outlives every view of it; the pages must be let go of before its memory is.
    weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address)
    return buffer
