"""The Triton kernels behind `dequantise_kernel`; imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dequantise_int8", "dequantise_nf4"]


@triton.jit
def dequantise_int8(codes_pointer, scales_pointer, out_pointer, weights, BLOCK: tl.constexpr):
    """Each program some weights: (code - 128) times the scale of 128 of them."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < weights
    share = tl.load(codes_pointer + place, mask=inside, other=128).to(tl.float32) - 128.0
    scale = tl.load(scales_pointer + place // 128, mask=inside, other=0.0)
    tl.store(out_pointer + place, (share * scale).to(out_pointer.dtype.element_ty), mask=inside)


@triton.jit
def dequantise_nf4(codes_pointer, scales_pointer, table_pointer, out_pointer, weights, BLOCK: tl.constexpr):
    """Each program some weights: the number that half a byte stands for, times the scale of 64 of them."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < weights
    pair = tl.load(codes_pointer + place // 2, mask=inside, other=0).to(tl.int32)
    code = (pair >> ((place % 2) * 4).to(tl.int32)) & 15
    share = tl.load(table_pointer + code)
    scale = tl.load(scales_pointer + place // 64, mask=inside, other=0.0)
    tl.store(out_pointer + place, (share * scale).to(out_pointer.dtype.element_ty), mask=inside)
