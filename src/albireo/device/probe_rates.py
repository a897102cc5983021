"""How fast this machine computes what training is made of, and whether a step of training works at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["MatmulRate", "best_seconds", "measure_matmul", "try_training_step"]

_LARGEST_MATRIX = {"cpu": 2048, "cuda": 8192}
_FIRST_MATRIX = 256


@dataclass(frozen=True)
class MatmulRate:
    """The product of two square matrices of random numbers.

    Attributes:
        device: torch's name of it.
        kind: "fp32", "tf32", "bf16" or "fp16".
        size: rows of a matrix.
        flops_per_second: two for each multiplication that is added up.
    """

    device: str
    kind: str
    size: int
    flops_per_second: float


def measure_matmul(device: torch.device, kind: str, *, seconds: float) -> MatmulRate:
    """Multiply square matrices for a while, as large as the time allows.

    Args:
        device: where.
        kind: "fp32", "tf32" (fp32 matrices in the tensor cores' short form, on a GPU), "bf16" or "fp16".
        seconds: about how long.

    Raises:
        RuntimeError: the device cannot multiply such matrices, or has no room.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    try:
        size, one = _FIRST_MATRIX, _matmul_seconds(device, dtype, _FIRST_MATRIX, seconds=0.0)
        # Larger matrices show what the device can; too large ones take too long where it is slow.
        while size < _LARGEST_MATRIX[device.type] and 8 * one < seconds / 4:
            size *= 2
            one = _matmul_seconds(device, dtype, size, seconds=0.0)
        one = _matmul_seconds(device, dtype, size, seconds=seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return MatmulRate(str(device), kind, size, 2.0 * size**3 / one)


def try_training_step(device: torch.device, dtype: torch.dtype) -> str | None:
    """Train a small network for a few steps, computing in a dtype under autocast.

    Args:
        device: where.
        dtype: fp32, bf16 or fp16.

    Returns:
        None if it learns; else what went wrong.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 32, generator=generator).to(device)
    targets = torch.randn(64, 1, generator=generator).to(device)
    # Without torch's own initialisation, which would draw from the process's generator.
    first, second = (
        torch.randn(shape, generator=generator).mul_(0.1).to(device).requires_grad_() for shape in ((32, 64), (64, 1))
    )
    optimizer = torch.optim.AdamW([first, second], lr=1e-2, fused=True)
    losses = []
    try:
        for _ in range(5):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = torch.nn.functional.mse_loss((torch.relu(inputs @ first) @ second).float(), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    # A comparison with a NaN is never true.
    return None if losses[-1] < losses[0] else f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"


def best_seconds(action: Callable[[], object], *, seconds: float, device: torch.device | None = None) -> float:
    """Return the best time of an action that is repeated for a while, three times at least.

    The best, since whatever else runs on the machine only ever makes it longer.

    Args:
        action: what to time; its first run does not count.
        seconds: about how long.
        device: a GPU that the action has work for, which is waited for.
    """

    def once() -> float:
        start = time.perf_counter()
        action()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    times = [once() for _ in range(3)]
    end = time.perf_counter() + seconds - sum(times)
    while time.perf_counter() < end:
        times.append(once())
    return min(times)


def _matmul_seconds(device: torch.device, dtype: torch.dtype, size: int, *, seconds: float) -> float:
    # Not zeros, which a GPU multiplies faster than anything real.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return best_seconds(lambda: left @ right, seconds=seconds, device=device)
