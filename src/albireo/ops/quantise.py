"""Weights in 8 and 4 bits, block by block, each with a scale of its own. Pure numbers.

`int8`: whole numbers from -127 to 127, a scale for 128 of them: 1.03 bytes a weight. `nf4`: the 16 numbers that cut a normal
distribution into parts of equal weight (Dettmers et al., 2023, QLoRA), a scale for 64 of them: 0.56 bytes a weight.
Codes and scales are given as bytes, so that whoever moves, shards and saves them need know nothing of what they are.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from albireo.device.triton_kernels import triton_runs_on

__all__ = ["BLOCK_WEIGHTS", "Code", "code_bytes", "dequantise", "quantise", "scale_bytes"]

Code = Literal["int8", "nf4"]

BLOCK_WEIGHTS: dict[str, int] = {"int8": 128, "nf4": 64}

_SCALE_BYTES = 4
_INT8_MOST = 127
_INT8_ZERO = 128

# The paper's table, of which both ends and 0 are exact: quantiles of a normal distribution, 8 below 0 and 9 from there on.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def code_bytes(weights: int, code: Code) -> int:
    """Return how many bytes codes take.

    Args:
        weights: how many are quantised; the last block is filled up.
        code: which.
    """
    padded = _blocks(weights, code) * BLOCK_WEIGHTS[code]
    return padded if code == "int8" else padded // 2


def scale_bytes(weights: int, code: Code) -> int:
    """Return how many bytes scales take; the arguments are those of `code_bytes`."""
    return _blocks(weights, code) * _SCALE_BYTES


def quantise(weight: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """Quantise a tensor. The same bits on every device.

    Args:
        weight: of any shape, in any dtype of floating point; its elements are taken in row-major order.
        code: how.

    Returns:
        Codes and scales, uint8, 1-D `[code_bytes]` and `[scale_bytes]`, on the weight's device.
    """
    flat = weight.detach().reshape(-1).float()
    block = BLOCK_WEIGHTS[code]
    missing = -flat.numel() % block
    blocks = torch.nn.functional.pad(flat, (0, missing)).view(-1, block)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    # By a tensor: a GPU divides by a plain number with a product, which rounds twice.
    scales = largest / torch.full_like(largest, _INT8_MOST) if code == "int8" else largest
    # A block of zeros has the code of zero, whatever it is multiplied by.
    shares = blocks / torch.where(scales > 0, scales, 1.0)
    if code == "int8":
        codes = (shares.round().clamp_(-_INT8_MOST, _INT8_MOST) + _INT8_ZERO).to(torch.uint8).view(-1)
    else:
        table = _table(shares.device)
        nearest = torch.bucketize(shares, (table[1:] + table[:-1]) / 2).to(torch.uint8).view(-1, 2)
        codes = nearest[:, 0] | (nearest[:, 1] << 4)
    return codes, scales.view(-1).view(torch.uint8)


def dequantise(codes: Tensor, scales: Tensor, weights: int, code: Code, dtype: torch.dtype) -> Tensor:
    """Return what a tensor has become by `quantise`. The same bits on every device.

    Args:
        codes: as `quantise` gave them.
        scales: the same.
        weights: how many they were.
        code: how they were quantised.
        dtype: of floating point; each weight is a product in fp32, rounded once.

    Returns:
        1-D `[weights]`.
    """
    # The compiler fuses torch's own operations, and a kernel of ours would only be in its way.
    if not torch.compiler.is_compiling() and triton_runs_on(codes.device):
        from albireo.ops.dequantise_kernel import dequantise_by_kernel

        return dequantise_by_kernel(codes, scales.view(torch.float32), weights, code, _table(codes.device), dtype)
    wide = scales.view(torch.float32).unsqueeze(1)
    if code == "int8":
        shares = codes.view(-1, BLOCK_WEIGHTS[code]).float() - _INT8_ZERO
    else:
        pairs = torch.stack((codes & 15, codes >> 4), dim=1)
        shares = _table(codes.device)[pairs.int()].view(-1, BLOCK_WEIGHTS[code])
    return (shares * wide).to(dtype).view(-1)[:weights]


def _blocks(weights: int, code: Code) -> int:
    return -(-weights // BLOCK_WEIGHTS[code])


@functools.cache
def _table(device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.tensor(_NF4, dtype=torch.float32, device=device)
