"""The Triton kernel behind `split_adam`; imported only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["split_adam_kernel", "triton_type"]


@triton.jit
def split_adam_kernel(
    table_pointer,
    tensors_pointer,
    firsts_pointer,
    factor_pointer,
    GRADIENT: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a chunk of a tensor; the table's first row has a group's values, the others a tensor each."""
    program = tl.program_id(0)
    tensor = tl.load(tensors_pointer + program)
    first = (program - tl.load(firsts_pointer + tensor)).to(tl.int64) * CHUNK
    row = table_pointer + (tensor + 1) * 7
    # Addresses are multiples of 16 bytes: loads and stores are as wide.
    weight = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.bfloat16)), 16)
    rest = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int16)), 16)
    gradient = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(GRADIENT)), 16)
    exp_avg = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
    exp_avg_sq = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(tl.float32)), 16)
    count = tl.load(tl.load(row + 5).to(tl.pointer_type(tl.float32))).to(tl.float64)
    numel = tl.load(row + 6)
    lr = tl.load(table_pointer).to(tl.float64, bitcast=True)
    # The bias corrections, each rounded to fp32 where torch's kernel does it.
    correction1 = 1.0 - tl.exp(count * tl.load(table_pointer + 4).to(tl.float64, bitcast=True))
    correction2 = 1.0 - tl.exp(count * tl.load(table_pointer + 5).to(tl.float64, bitcast=True))
    step_size = (lr / correction1.to(tl.float32).to(tl.float64)).to(tl.float32)
    root = tl.sqrt_rn(correction2.to(tl.float32))
    factor = 1.0
    if factor_pointer is not None:
        factor = tl.load(factor_pointer)
    # Where a mask is, loads are narrow: all but a tensor's last chunk go without.
    if first + CHUNK <= numel:
        for start in range(0, CHUNK, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            _step(
                table_pointer, weight + at, rest + at, gradient + at, exp_avg + at, exp_avg_sq + at, None,
                step_size, root, factor, DECOUPLED, MAXIMIZE,
            )  # fmt: skip
    else:
        for start in range(0, CHUNK, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            _step(
                table_pointer, weight + at, rest + at, gradient + at, exp_avg + at, exp_avg_sq + at, at < numel,
                step_size, root, factor, DECOUPLED, MAXIMIZE,
            )  # fmt: skip


@triton.jit
def _step(
    table_pointer,
    weight_at,
    rest_at,
    gradient_at,
    exp_avg_at,
    exp_avg_sq_at,
    mask,
    step_size,
    root,
    factor,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    """Step a block. Torch's kernel has the group's values in fp64 and all else in fp32: so do sums and products here."""
    lr = tl.load(table_pointer).to(tl.float64, bitcast=True)
    decay = tl.load(table_pointer + 1).to(tl.float64, bitcast=True)
    beta1 = tl.load(table_pointer + 2).to(tl.float64, bitcast=True)
    beta2 = tl.load(table_pointer + 3).to(tl.float64, bitcast=True)
    eps = tl.load(table_pointer + 6).to(tl.float64, bitcast=True)
    # As `split_weights.join`.
    upper = tl.load(weight_at, mask=mask).to(tl.int16, bitcast=True).to(tl.int32) << 16
    master = (upper + tl.load(rest_at, mask=mask).to(tl.int32)).to(tl.float32, bitcast=True)
    gradient = tl.load(gradient_at, mask=mask).to(tl.float32) * factor
    if MAXIMIZE:
        gradient = -gradient
    if DECOUPLED:
        master = (master.to(tl.float64) - lr * decay * master.to(tl.float64)).to(tl.float32)
    else:
        gradient = (gradient.to(tl.float64) + decay * master.to(tl.float64)).to(tl.float32)
    wide = gradient.to(tl.float64)
    exp_avg = (beta1 * tl.load(exp_avg_at, mask=mask).to(tl.float64) + (1.0 - beta1) * wide).to(tl.float32)
    exp_avg_sq = beta2 * tl.load(exp_avg_sq_at, mask=mask).to(tl.float64) + (1.0 - beta2) * wide * wide
    exp_avg_sq = exp_avg_sq.to(tl.float32)
    denominator = (tl.div_rn(tl.sqrt_rn(exp_avg_sq), root).to(tl.float64) + eps).to(tl.float32)
    master = master - tl.div_rn(step_size * exp_avg, denominator)
    tl.store(exp_avg_at, exp_avg, mask=mask)
    tl.store(exp_avg_sq_at, exp_avg_sq, mask=mask)
    # As `split_weights.split`.
    weight = master.to(tl.bfloat16)
    rest = master.to(tl.int32, bitcast=True) - (weight.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    tl.store(weight_at, weight, mask=mask)
    tl.store(rest_at, tl.minimum(tl.maximum(rest, -32768), 32767).to(tl.int16), mask=mask)


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's word for what a gradient is."""
    return {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
