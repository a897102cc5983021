"""What `dequantise` does in one pass, as a Triton kernel: a byte is read for each weight or two, and the weight written."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dequantise_by_kernel"]

_BLOCK = 4096


def dequantise_by_kernel(
    codes: Tensor, scales: Tensor, weights: int, code: str, table: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return dequantised weights; see `quantise.dequantise`.

    Args:
        codes: uint8, on a GPU.
        scales: `[blocks]`, fp32.
        weights: how many.
        code: "int8" or "nf4".
        table: `[16]`, fp32: what the codes of nf4 stand for.
        dtype: of the result.
    """
    from albireo.ops.dequantise_triton import dequantise_int8, dequantise_nf4

    out = torch.empty(weights, dtype=dtype, device=codes.device)
    grid = (-(-weights // _BLOCK),)
    with torch.cuda.device(codes.device):
        if code == "int8":
            dequantise_int8[grid](codes, scales, out, weights, BLOCK=_BLOCK, num_warps=8)
        else:
            dequantise_nf4[grid](codes, scales, table, out, weights, BLOCK=_BLOCK, num_warps=8)
    return out
