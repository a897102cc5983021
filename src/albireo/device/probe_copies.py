"""How fast bytes move: within the host, within a GPU, and between the two."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["DeviceCopyRates", "HostCopyRate", "measure_device_copies", "measure_host_copy"]

# Far above every cache, and a power of two: torch 2.11 rounds what it pins up to the next one.
_BLOCK_BYTES = 256 * 2**20
_SMALLEST_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class HostCopyRate:
    """Copying within the host's memory, with the threads that torch has.

    Attributes:
        block_bytes: size of a copy.
        bytes_per_second: bytes copied; memory moves twice as many, since each is read and written.
        threads: how many copied.
    """

    block_bytes: int
    bytes_per_second: float
    threads: int


@dataclass(frozen=True)
class DeviceCopyRates:
    """Copying to, from and within a GPU, in bytes copied per second.

    Attributes:
        device: torch's name of the GPU.
        block_bytes: size of a copy.
        host_to_device_pinned_bytes_per_second: from pinned memory.
        host_to_device_unpinned_bytes_per_second: from ordinary memory, as code that does not pin does it.
        device_to_host_pinned_bytes_per_second: into pinned memory.
        both_ways_pinned_bytes_per_second: both directions at once on two streams, added up.
        within_device_bytes_per_second: on the GPU; its memory moves twice as many.
    """

    device: str
    block_bytes: int
    host_to_device_pinned_bytes_per_second: float
    host_to_device_unpinned_bytes_per_second: float
    device_to_host_pinned_bytes_per_second: float
    both_ways_pinned_bytes_per_second: float
    within_device_bytes_per_second: float


def measure_host_copy(*, seconds: float, available_bytes: int | None = None) -> HostCopyRate:
    """Copy blocks of the host's memory for a while.

    Args:
        seconds: about how long.
        available_bytes: what may be used; blocks are smaller where that is little.
    """
    block = _block_bytes(available_bytes)
    source = torch.ones(block, dtype=torch.uint8)
    target = torch.zeros(block, dtype=torch.uint8)
    count, elapsed = _repeat(lambda: target.copy_(source), seconds=seconds)
    return HostCopyRate(block, count * block / elapsed, torch.get_num_threads())


def measure_device_copies(device: torch.device, *, seconds: float) -> DeviceCopyRates:
    """Copy blocks to, from and within a GPU, each for a while.

    Args:
        device: the GPU.
        seconds: about how long for each of the five.

    Raises:
        RuntimeError: not even a small block finds room.
    """
    block = _block_bytes(torch.cuda.mem_get_info(device)[0])
    # On the GPU two blocks; pinned, two; ordinary, one.
    first, second = (torch.zeros(block, dtype=torch.uint8, device=device) for _ in range(2))
    outward = torch.ones(block, dtype=torch.uint8).pin_memory()
    inward = torch.empty(block, dtype=torch.uint8, pin_memory=True)
    ordinary = torch.ones(block, dtype=torch.uint8)
    up, down = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def both() -> None:
        with torch.cuda.stream(up):
            first.copy_(outward, non_blocking=True)
        with torch.cuda.stream(down):
            inward.copy_(second, non_blocking=True)

    def rate(action: Callable[[], object], blocks: int = 1) -> float:
        count, elapsed = _repeat(action, seconds=seconds, wait=lambda: torch.cuda.synchronize(device))
        return count * blocks * block / elapsed

    with torch.cuda.device(device):
        return DeviceCopyRates(
            device=str(device),
            block_bytes=block,
            host_to_device_pinned_bytes_per_second=rate(lambda: first.copy_(outward, non_blocking=True)),
            host_to_device_unpinned_bytes_per_second=rate(lambda: first.copy_(ordinary)),
            device_to_host_pinned_bytes_per_second=rate(lambda: inward.copy_(first, non_blocking=True)),
            both_ways_pinned_bytes_per_second=rate(both, blocks=2),
            within_device_bytes_per_second=rate(lambda: second.copy_(first)),
        )


def _block_bytes(available_bytes: int | None) -> int:
    """Return the size of a block such that several fit well."""
    block = _BLOCK_BYTES
    while available_bytes is not None and block > _SMALLEST_BLOCK_BYTES and 8 * block > available_bytes:
        block //= 2
    return block


def _repeat(
    action: Callable[[], object], *, seconds: float, wait: Callable[[], object] = lambda: None
) -> tuple[int, float]:
    """Repeat an action for a while; returns how often and how long.

    What a device is given runs later, so it is given as much as should take the time, and then waited for.
    """
    action()
    wait()
    count, elapsed = 1, 0.0
    while True:
        start = time.perf_counter()
        for _ in range(count):
            action()
        wait()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds / 2:
            return count, elapsed
        # Never so many more that a first reading which was too quick makes it take much too long.
        count = max(count + 1, min(8 * count, int(count * seconds / max(elapsed, 1e-6))))
